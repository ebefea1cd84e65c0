// The list of Logstores, and the figures of the store.

import { Table, badge, bytes, cell, count, el, plot, rate, restartable, seconds, setText } from '/console/view.js';

const POLL_MS = 2000;
const PAGE = 50;
// For how many Logstores the samples of the plots are kept.
const KEPT = 500;

const METHODS = { none: 'Not encrypted', service_key: 'Service key', byok: 'Customer key' };

// The samples by name, and what was looked for, over changes of the view.
const kept = new Map();
const asked = { filter: '', state: '', sort: 'name', descending: false, offset: 0 };

function samplesOf(name) {
  let samples = kept.get(name);
  if (!samples) {
    samples = { appends: [], reads: [] };
    kept.set(name, samples);
    if (kept.size > KEPT) {
      kept.delete(kept.keys().next().value);
    }
  }
  return samples;
}

export function encryptionOf(figures) {
  if (!figures) {
    return '–';
  }
  const method = METHODS[figures.method] ?? figures.method;
  const algorithm = figures.algorithm ? ` · ${figures.algorithm}` : '';
  return `${method}${algorithm}${figures.method !== 'none' && !figures.encrypting ? ' (paused)' : ''}`;
}

export function leaseOf(it) {
  const left = it.key.lease_left_s;
  const age = it.lease_age_s;
  const parts = [];
  if (age !== null && age !== undefined) {
    parts.push(`${seconds(age)} old`);
  }
  if (left !== null && left !== undefined) {
    parts.push(left > 0 ? `${seconds(left)} left` : 'ended');
  }
  // Each part stays on one line.
  return parts.map((part) => part.replaceAll(' ', '\u00a0')).join(', ') || '–';
}

// The faults of a Logstore that an operator has to know of.
export function troubles(it) {
  const found = [];
  if (it.fault) {
    found.push(`Its figures cannot be read (${it.fault}).`);
  }
  if (it.figures?.latched) {
    found.push('A shard has stopped writing: see the log of the service.');
  }
  if (it.figures?.unreadable_segments > 0) {
    found.push(`${count(it.figures.unreadable_segments)} segments cannot be read: run envelog verify.`);
  }
  if (it.figures?.losses > 0) {
    found.push(`${count(it.figures.losses)} accepted losses.`);
  }
  return found;
}

const COLUMNS = [
  { label: 'Logstore', sort: 'name' },
  { label: 'Key', sort: 'state' },
  { label: 'Encryption' },
  { label: 'Lease' },
  { label: 'Raw', class: 'number' },
  { label: 'Compressed', class: 'number' },
  { label: 'Stored', class: 'number' },
  { label: 'Appends', class: 'number', sort: 'appends' },
  { label: 'Reads', class: 'number', sort: 'reads' },
  { label: 'Refused', class: 'number', sort: 'refusals' },
  { label: 'Lag', class: 'number' },
];

function makeRow(it) {
  const name = `${it.project}/${it.logstore}`;
  const samples = samplesOf(name);
  const link = el('a', { href: `#/logstore/${encodeURIComponent(it.project)}/${encodeURIComponent(it.logstore)}` }, name);
  const trouble = el('span', { class: 'trouble', hidden: true });
  const key = badge();
  const reason = el('span', { class: 'reason', hidden: true });
  const [encryption, lease, raw, compressed, stored, refused, lag] = Array.from({ length: 7 }, () => cell());
  const [appends, reads] = [plot('Appends', samples.appends), plot('Reads', samples.reads)];
  const cells = [
    el('span', {}, link, trouble),
    el('span', {}, key.node, reason),
    encryption.node, lease.node, raw.node, compressed.node, stored.node, appends.node, reads.node, refused.node, lag.node,
  ];
  const update = (now) => {
    const found = troubles(now);
    trouble.hidden = found.length === 0;
    setText(trouble, found.join(' '));
    key.set(now.key.state);
    reason.hidden = !now.key.reason;
    setText(reason, now.key.reason ?? '');
    encryption.set(encryptionOf(now.figures));
    lease.set(leaseOf(now));
    raw.set(bytes(now.figures?.raw));
    compressed.set(bytes(now.figures?.compressed));
    stored.set(bytes(now.figures?.stored));
    appends.push(now.append_rate, rate(now.append_rate));
    reads.push(now.read_rate, rate(now.read_rate));
    refused.set(count(now.refusals));
    lag.set(count(now.consumers?.lag));
  };
  return { cells, update };
}

function tile(label, content) {
  const note = el('p', { class: 'muted small' }, '\u00a0');
  const node = el('div', { class: 'tile' }, el('h2', {}, label), content, note);
  return { node, note: (text) => setText(note, text || '\u00a0') };
}

const sums = { appends: [], reads: [] };

function tiles() {
  const [logstores, refusals, latency] = [cell({ class: 'big' }), cell({ class: 'big' }), cell({ class: 'big' })];
  const [appends, reads] = [plot('Appends', sums.appends), plot('Reads', sums.reads)];
  const all = {
    logstores: tile('Logstores', logstores.node),
    appends: tile('Appends', appends.node),
    reads: tile('Reads', reads.node),
    refusals: tile('Refused key uses', refusals.node),
    latency: tile('Mean append', latency.node),
  };
  const node = el('section', { class: 'tiles', 'aria-label': 'Figures' }, ...Object.values(all).map((it) => it.node));
  const update = ({ sums: now, store }) => {
    logstores.set(count(now.logstores));
    const bad = [['revoked', 'revoked'], ['outage', 'in a KMS outage']].filter(([state]) => now.states[state] > 0);
    all.logstores.note(bad.map(([state, text]) => `${count(now.states[state])} ${text}`).join(', ') || 'no key is refused');
    appends.push(now.append_rate, rate(now.append_rate));
    reads.push(now.read_rate, rate(now.read_rate));
    refusals.set(count(now.refusals));
    all.latency.node.hidden = !store;
    if (store) {
      const reasons = Object.entries(store.refusals).filter(([, times]) => times > 0);
      all.refusals.note(reasons.map(([reason, times]) => `${reason.replaceAll('_', ' ')} ${count(times)}`).join(', ') || 'since the start');
      all.appends.note(`${bytes(store.pending_bytes)} wait to be written`);
      all.reads.note(`${count(store.service.connections)} connections, ${count(store.service.refused)} calls refused`);
      latency.set(seconds(store.append_mean_s));
      all.latency.note(`fsync ${seconds(store.sync_mean_s)}`);
    } else {
      all.refusals.note('since the start');
    }
  };
  return { node, update };
}

// The faults of the store, as sentences.
function warnings(store) {
  if (!store) {
    return [];
  }
  const kms = store.kms.unreachable + store.kms.invalid;
  return [
    [store.reserve_short, 'A part of the room for a full disk is missing.'],
    [store.retention_suspended, 'Retention by age is suspended, because the clock has jumped ahead.'],
    [store.groups_lost > 0, `${count(store.groups_lost)} acknowledged groups were lost with their key.`],
    [store.audit_failures > 0, `${count(store.audit_failures)} records could not be written to the audit log.`],
    [store.sync_failures > 0, `${count(store.sync_failures)} syncs have failed.`],
    [store.writers_latched > 0, `${count(store.writers_latched)} times a failure has stopped the writer of a shard.`],
    [kms > 0, `${count(kms)} calls to a KMS had no valid answer.`],
    [store.service.failed > 0, `${count(store.service.failed)} calls have failed with a status of 5xx.`],
  ].filter(([holds]) => holds).map(([, text]) => text);
}

const SORTS = [['name', 'Name'], ['state', 'Key state'], ['appends', 'Appends'], ['reads', 'Reads'], ['refusals', 'Refusals']];

// Sorts by a column: rates and counts with the highest first. The same column again turns the order.
function sortBy(sort) {
  asked.descending = asked.sort === sort ? !asked.descending : !['name', 'state'].includes(sort);
  asked.sort = sort;
  asked.offset = 0;
}

function sortButton(column, again) {
  const arrow = el('span', { class: 'arrow', 'aria-hidden': 'true' });
  const button = el('button', { type: 'button', class: 'sort' }, column.label, arrow);
  button.addEventListener('click', () => {
    sortBy(column.sort);
    again();
  });
  return { button, arrow };
}

function toolbar(again) {
  const filter = el('input', { id: 'filter', type: 'search', placeholder: 'Part of a name', autocomplete: 'off', spellcheck: 'false', maxlength: 128 });
  filter.value = asked.filter;
  filter.addEventListener('input', () => {
    asked.filter = filter.value.trim();
    asked.offset = 0;
    again();
  });
  const options = [['', 'All states'], ['revoked', 'Revoked'], ['outage', 'KMS outage'], ['idle', 'Idle'], ['active', 'Active'], ['none', 'No key']];
  const state = el('select', { id: 'state' }, ...options.map(([value, text]) => el('option', { value }, text)));
  state.value = asked.state;
  state.addEventListener('change', () => {
    asked.state = state.value;
    asked.offset = 0;
    again();
  });
  // The heads of the table sort it too, but narrow screens have none.
  const sort = el('select', { id: 'sort' }, ...SORTS.map(([value, text]) => el('option', { value }, text)));
  sort.value = asked.sort;
  sort.addEventListener('change', () => {
    sortBy(sort.value);
    again();
  });
  return el(
    'div',
    { class: 'toolbar', role: 'search' },
    el('div', { class: 'field' }, el('label', { for: 'filter' }, 'Filter'), filter),
    el('div', { class: 'field' }, el('label', { for: 'state' }, 'Key state'), state),
    el('div', { class: 'field narrow' }, el('label', { for: 'sort' }, 'Sort by'), sort),
  );
}

// The buttons that turn pages. `asked` has the offset.
export function pager(asked, size, again) {
  const [back, on] = [el('button', { type: 'button' }, 'Previous'), el('button', { type: 'button' }, 'Next')];
  const range = el('span', { class: 'muted' });
  const turn = (button, by) => button.addEventListener('click', () => {
    if (button.getAttribute('aria-disabled') !== 'true') {
      asked.offset = Math.max(0, asked.offset + by);
      again();
    }
  });
  turn(back, -size);
  turn(on, size);
  const update = (shown, matching) => {
    const last = asked.offset + shown;
    setText(range, shown === 0 ? 'Nothing matches' : `${count(asked.offset + 1)} to ${count(last)} of ${count(matching)}`);
    // A button that has the focus stays, so that the focus does too.
    back.setAttribute('aria-disabled', String(asked.offset === 0));
    on.setAttribute('aria-disabled', String(last >= matching));
    back.disabled = asked.offset === 0 && document.activeElement !== back;
    on.disabled = last >= matching && document.activeElement !== on;
  };
  return { node: el('nav', { class: 'pager', 'aria-label': 'Pages' }, back, range, on), update };
}

// Says which keys have changed their state since the answer before.
function changes(before, now) {
  return now
    .filter((it) => before.has(`${it.project}/${it.logstore}`) && before.get(`${it.project}/${it.logstore}`) !== it.key.state)
    .map((it) => `${it.project}/${it.logstore}: key ${it.key.state}`);
}

export function logstores({ client, signal, failed, say }) {
  let wake = () => {};
  const again = () => wake();
  const heads = COLUMNS.map((column) => (column.sort ? sortButton(column, again) : null));
  const columns = COLUMNS.map((column, at) => ({ ...column, head: heads[at]?.button }));
  const table = new Table('Logstores', columns);
  const figures = tiles();
  const notes = el('ul', { class: 'warnings', hidden: true, 'aria-label': 'Warnings' });
  const pages = pager(asked, PAGE, again);
  let states = new Map();
  const showSort = () => COLUMNS.forEach((column, at) => {
    if (heads[at]) {
      const isThis = column.sort === asked.sort;
      const order = asked.descending ? 'descending' : 'ascending';
      table.heads[at].setAttribute('aria-sort', isThis ? order : 'none');
      setText(heads[at].arrow, isThis ? (asked.descending ? ' ↓' : ' ↑') : '');
    }
  });
  const step = async () => {
    const { filter, state, sort, descending, offset } = asked;
    const answer = await client.get('overview', { filter, state, sort, descending, offset, size: PAGE }, signal);
    if (answer.logstores.length === 0 && asked.offset > 0 && asked.offset === offset) {
      asked.offset = 0;
      return 0;
    }
    showSort();
    figures.update(answer);
    const found = warnings(answer.store);
    notes.hidden = found.length === 0;
    if (notes.textContent !== found.join('')) {
      notes.replaceChildren(...found.map((text) => el('li', {}, text)));
    }
    table.show(answer.logstores, (it) => `${it.project}/${it.logstore}`, makeRow);
    pages.update(answer.logstores.length, answer.matching);
    const changed = changes(states, answer.logstores);
    if (changed.length > 0) {
      say(changed.join('. '));
    }
    states = new Map(answer.logstores.map((it) => [`${it.project}/${it.logstore}`, it.key.state]));
    return POLL_MS;
  };
  // A change of the filter ends the wait for the next poll.
  wake = restartable(signal, step, failed);
  const node = el(
    'div',
    { class: 'view' },
    el('h1', {}, 'Logstores'),
    figures.node,
    notes,
    el('section', { class: 'card', 'aria-label': 'Logstores' }, toolbar(again), el('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': 'Table of Logstores' }, table.node), pages.node),
  );
  return { node, title: 'Logstores' };
}
