// Elements, figures as text, small plots, and loops. Every text from the service is set as text:
// nothing here, and nothing else in the console, makes markup of a string.

const SVG = 'http://www.w3.org/2000/svg';
const SAMPLES = 60;
// A screen reader is not told more often than this.
const ANNOUNCE_EVERY_MS = 10_000;

// An element with attributes and children. A child that is text becomes a text node.
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) {
      node.setAttribute(name, '');
    } else if (value !== false && value !== undefined && value !== null) {
      node.setAttribute(name, String(value));
    }
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Changes a text only if it differs, so that nothing is read out or selected again.
export function setText(node, text) {
  if (node.textContent !== text) {
    node.textContent = text;
  }
}

// Characters that are not seen, or that change the direction of others, become visible.
export function visible(text) {
  const code = (it) => `\u{27e8}U+${it.codePointAt(0).toString(16).toUpperCase().padStart(4, '0')}\u{27e9}`;
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g, code);
}

const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];

export function bytes(number) {
  if (number === null || number === undefined) {
    return '–';
  }
  let unit = 0;
  let value = number;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || value >= 100 ? 0 : 1;
  return `${value.toFixed(digits)} ${UNITS[unit]}`;
}

export function rate(number) {
  return number === null || number === undefined ? '–' : `${bytes(number)}/s`;
}

export function count(number) {
  return number === null || number === undefined ? '–' : number.toLocaleString('en');
}

export function seconds(number) {
  if (number === null || number === undefined) {
    return '–';
  }
  if (number < 0.001) {
    return `${(number * 1e6).toFixed(0)} µs`;
  }
  if (number < 1) {
    return `${(number * 1e3).toFixed(number < 0.01 ? 1 : 0)} ms`;
  }
  if (number < 120) {
    return `${number.toFixed(0)} s`;
  }
  return number < 7200 ? `${(number / 60).toFixed(0)} min` : `${(number / 3600).toFixed(1)} h`;
}

// A time in UTC, as text.
export function time(us) {
  if (!us) {
    return '–';
  }
  const date = new Date(us / 1000);
  if (Number.isNaN(date.getTime())) {
    return String(us);
  }
  return `${date.toISOString().slice(0, 19).replace('T', ' ')}Z`;
}

const STATES = {
  active: { text: 'Active', tone: 'good', shape: 'M8 1.5a6.5 6.5 0 1 1 0 13a6.5 6.5 0 0 1 0-13z' },
  idle: { text: 'Idle', tone: 'calm', shape: 'M8 1.5a6.5 6.5 0 1 1 0 13a6.5 6.5 0 0 1 0-13zm0 3a3.5 3.5 0 1 0 0 7a3.5 3.5 0 0 0 0-7z' },
  none: { text: 'No key', tone: 'calm', shape: 'M2 7h12v2H2z' },
  outage: { text: 'KMS outage', tone: 'warn', shape: 'M8 1.5l7 13H1z' },
  revoked: { text: 'Revoked', tone: 'bad', shape: 'M3.4 1.8L8 6.4l4.6-4.6l1.6 1.6L9.6 8l4.6 4.6l-1.6 1.6L8 9.6l-4.6 4.6l-1.6-1.6L6.4 8L1.8 3.4z' },
};

// The state of a key: a shape, and a word beside it.
export function badge() {
  const path = svg('path', { 'fill-rule': 'evenodd' });
  const icon = svg('svg', { viewBox: '0 0 16 16', 'aria-hidden': 'true', focusable: 'false' }, path);
  const word = el('span');
  const node = el('span', { class: 'badge' }, icon, word);
  return {
    node,
    set(state) {
      const { text, tone, shape } = STATES[state] ?? { text: state, tone: 'calm', shape: STATES.idle.shape };
      if (node.dataset.state !== state) {
        node.dataset.state = state;
        node.dataset.tone = tone;
        path.setAttribute('d', shape);
        setText(word, text);
      }
    },
  };
}

// A small plot of the last samples, with the newest one as text beside it.
export function plot(label, samples = []) {
  const line = svg('polyline', { class: 'line' });
  const area = svg('polygon', { class: 'area' });
  const picture = svg('svg', { viewBox: '0 0 96 24', class: 'spark', 'aria-hidden': 'true', focusable: 'false', preserveAspectRatio: 'none' }, area, line);
  const value = el('span', { class: 'value' }, '–');
  const node = el('span', { class: 'plot' }, picture, value);
  return {
    node,
    samples,
    push(number, text) {
      samples.push(number ?? 0);
      samples.splice(0, samples.length - SAMPLES);
      setText(value, text);
      const top = Math.max(...samples, 1);
      const step = 96 / (SAMPLES - 1);
      const left = 96 - (samples.length - 1) * step;
      const points = samples.map((it, at) => `${(left + at * step).toFixed(1)},${(22 - (it / top) * 20).toFixed(1)}`);
      line.setAttribute('points', points.join(' '));
      area.setAttribute('points', `${left.toFixed(1)},24 ${points.join(' ')} 96,24`);
    },
  };
}

// A table whose rows stay the same elements while their figures change. On narrow screens it is
// shown as a list, so its roles are given.
export class Table {
  constructor(caption, columns, { captionIsSeen = false } = {}) {
    this.columns = columns;
    this.heads = columns.map((column) => el('th', { scope: 'col', role: 'columnheader', class: column.class }, column.head ?? column.label));
    this.body = el('tbody', { role: 'rowgroup' });
    this.node = el(
      'table',
      { role: 'table', class: 'list' },
      el('caption', { class: captionIsSeen ? null : 'unseen' }, caption),
      el('thead', { role: 'rowgroup' }, el('tr', { role: 'row' }, ...this.heads)),
      this.body,
    );
    this.rows = new Map();
  }

  // Shows these items in this order. Each has a row of its own, by `keyOf`; `make` returns the cells
  // of a new row with a function that updates them.
  show(items, keyOf, make) {
    const before = this.rows;
    this.rows = new Map();
    let place = this.body.firstElementChild;
    for (const item of items) {
      const key = keyOf(item);
      const row = before.get(key) ?? this.#row(make(item));
      before.delete(key);
      row.update(item);
      this.rows.set(key, row);
      if (row.node === place) {
        place = place.nextElementSibling;
      } else {
        this.body.insertBefore(row.node, place);
      }
    }
    for (const gone of before.values()) {
      gone.node.remove();
    }
  }

  #row({ cells, update }) {
    const nodes = cells.map((content, at) => {
      const column = this.columns[at];
      const attributes = { class: column.class, 'data-label': column.label };
      return at === 0
        ? el('th', { scope: 'row', role: 'rowheader', ...attributes }, content)
        : el('td', { role: 'cell', ...attributes }, content);
    });
    return { node: el('tr', { role: 'row' }, ...nodes), update };
  }
}

// A cell whose text changes.
export function cell(attributes = {}) {
  const node = el('span', attributes);
  return { node, set: (text) => setText(node, text) };
}

// A list of names and values.
export function facts(entries) {
  const list = el('dl', { class: 'facts' });
  const values = new Map();
  for (const [name, label] of entries) {
    const value = el('dd', {}, '–');
    values.set(name, value);
    list.append(el('div', {}, el('dt', {}, label), value));
  }
  return { node: list, set: (name, text) => setText(values.get(name), text), value: (name) => values.get(name) };
}

// Tells screen readers, politely and seldom: of several texts in a short time, the last one.
export class Announcer {
  #node;
  #next = null;
  #timer = null;
  #last = -Infinity;

  constructor(node) {
    this.#node = node;
  }

  say(text) {
    this.#next = text;
    if (this.#timer === null) {
      const wait = Math.max(0, this.#last + ANNOUNCE_EVERY_MS - performance.now());
      this.#timer = setTimeout(() => this.#flush(), wait);
    }
  }

  #flush() {
    this.#timer = null;
    this.#last = performance.now();
    setText(this.#node, this.#next);
  }
}

export function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener('abort', stop);
      resolve();
    }, ms);
    signal.addEventListener('abort', stop, { once: true });
  });
}

// Waits until the page can be seen.
async function shown(signal) {
  while (document.hidden) {
    await sleep(500, signal);
  }
}

// Calls `step` again and again until the signal. The step returns when to call it next, in
// milliseconds. After a failure the loop waits longer, and `failed` is told.
export async function loop(signal, step, failed) {
  let failures = 0;
  while (!signal.aborted) {
    try {
      await shown(signal);
      const wait = await step();
      failed(null);
      failures = 0;
      await sleep(wait, signal);
    } catch (error) {
      if (signal.aborted) {
        return;
      }
      failed(error);
      failures = Math.min(failures + 1, 4);
      await sleep(1000 * 2 ** (failures - 1), signal).catch(() => {});
    }
  }
}

// As `loop`, with a function that ends the present wait and has the step called at once.
export function restartable(signal, step, failed) {
  let turn = new AbortController();
  const run = async () => {
    while (!signal.aborted) {
      turn = new AbortController();
      const stop = () => turn.abort();
      signal.addEventListener('abort', stop, { once: true });
      await loop(turn.signal, step, failed);
      signal.removeEventListener('abort', stop);
    }
  };
  run();
  return () => turn.abort();
}
