// One Logstore: its keys and shards, its consumer groups, and its newest logs.

import { Table, badge, bytes, cell, count, el, facts, loop, plot, rate, seconds, setText, time, visible } from '/console/view.js';
import { encryptionOf, leaseOf, troubles } from '/console/logstores.js';

const POLL_MS = 2000;
// How long a call waits for logs.
const WAIT_MS = 25_000;
// The pause behind an answer with logs, so that many appends come together.
const GATHER_MS = 300;
// How many groups of each shard are shown at first.
const BACK = 50;
// The most logs in the list.
const LINES_MAX = 1000;

function addressOf({ project, logstore }, tab) {
  const base = `#/logstore/${encodeURIComponent(project)}/${encodeURIComponent(logstore)}`;
  return tab ? `${base}/${tab}` : base;
}

const TABS = [['', 'Overview'], ['consumers', 'Consumers'], ['tail', 'Live tail']];

export function logstore(context) {
  const { parameters } = context;
  const name = `${parameters.project}/${parameters.logstore}`;
  const key = badge();
  const reason = el('span', { class: 'reason', hidden: true });
  const links = TABS.map(([tab, text]) => el('a', { href: addressOf(parameters, tab), 'aria-current': tab === parameters.tab ? 'page' : null }, text));
  const make = { consumers, tail }[parameters.tab] ?? overview;
  const part = make(context);
  const node = el(
    'div',
    { class: 'view' },
    el('p', { class: 'back' }, el('a', { href: '#/' }, 'All Logstores')),
    el('div', { class: 'title' }, el('h1', {}, name), key.node, reason),
    el('nav', { class: 'tabs', 'aria-label': `Views of ${name}` }, ...links),
    part.node,
  );
  let state = null;
  const step = async () => {
    const { project, logstore: of } = parameters;
    const now = await context.client.get('logstore', { project, logstore: of }, context.signal);
    key.set(now.key.state);
    reason.hidden = !now.key.reason;
    setText(reason, now.key.reason ?? '');
    if (state !== null && state !== now.key.state) {
      context.say(`${name}: key ${now.key.state}`);
    }
    state = now.key.state;
    part.update?.(now);
    return POLL_MS;
  };
  loop(context.signal, step, context.failed);
  return { node, title: name };
}

function card(title, ...children) {
  return el('section', { class: 'card', 'aria-label': title }, el('h2', {}, title), ...children);
}

function scrolled(label, table) {
  return el('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': label }, table.node);
}

function overview() {
  const [appends, reads] = [plot('Appends'), plot('Reads')];
  const notes = el('ul', { class: 'warnings', hidden: true, 'aria-label': 'Warnings' });
  const data = facts([
    ['raw', 'Raw'], ['compressed', 'Compressed'], ['stored', 'Stored on disk'], ['ratio', 'Stored for each raw byte'],
    ['logs', 'Logs'], ['segments', 'Segments'], ['queued', 'Waiting to be written'], ['refused', 'Refused key uses'],
    ['appends', 'Appends'], ['reads', 'Reads'],
  ]);
  data.value('appends').replaceChildren(appends.node);
  data.value('reads').replaceChildren(reads.node);
  const key = facts([
    ['encryption', 'Method and algorithm'], ['lease', 'Lease'], ['cmk', 'Customer master key'], ['role', 'Role'], ['region', 'Region'],
  ]);
  const config = facts([
    ['ttl', 'Retention'], ['limit', 'Limit of its size'], ['compression', 'Compression'], ['revision', 'Revision'],
    ['created', 'Created'], ['changed', 'Changed'],
  ]);
  const keys = new Table('Data keys', [
    { label: 'Version' }, { label: 'State' }, { label: 'Wrapped by' }, { label: 'Segments', class: 'number' }, { label: 'Stored', class: 'number' },
  ]);
  const shards = new Table('Shards', [
    { label: 'Shard' }, { label: 'Status' }, { label: 'Groups so far', class: 'number' }, { label: 'First hash key', class: 'mono' },
  ]);
  const node = el(
    'div',
    { class: 'columns' },
    notes,
    card('Data', data.node),
    card('Key', key.node),
    card('Configuration', config.node),
    card('Data keys', scrolled('Data keys', keys)),
    card('Shards', scrolled('Shards', shards)),
  );
  const update = (now) => {
    const found = troubles(now);
    if (now.recovered_bytes_dropped > 0) {
      found.push(`The last recovery has dropped ${bytes(now.recovered_bytes_dropped)} of a torn tail that were never acknowledged.`);
    }
    notes.hidden = found.length === 0;
    if (notes.textContent !== found.join('')) {
      notes.replaceChildren(...found.map((text) => el('li', {}, text)));
    }
    const figures = now.figures;
    data.set('raw', bytes(figures?.raw));
    data.set('compressed', bytes(figures?.compressed));
    data.set('stored', bytes(figures?.stored));
    data.set('ratio', figures?.raw > 0 ? (figures.stored / figures.raw).toFixed(2) : '–');
    data.set('logs', count(figures?.logs));
    data.set('segments', count(figures?.segments));
    data.set('queued', bytes(now.queued_bytes));
    data.set('refused', count(now.refusals));
    appends.push(now.append_rate, rate(now.append_rate));
    reads.push(now.read_rate, rate(now.read_rate));
    key.set('encryption', encryptionOf(figures));
    key.set('lease', leaseOf(now));
    key.set('cmk', visible(figures?.cmk?.cmk_key_id ?? '–'));
    key.set('role', visible(figures?.cmk?.arn ?? '–'));
    key.set('region', visible(figures?.cmk?.region_id ?? '–'));
    config.set('ttl', now.config.ttl_days === null ? 'for ever' : `${count(now.config.ttl_days)} days`);
    config.set('limit', now.config.retention_bytes === null ? 'none' : bytes(now.config.retention_bytes));
    config.set('compression', String(now.config.compression));
    config.set('revision', count(now.config.revision));
    config.set('created', time(now.config.create_time * 1e6));
    config.set('changed', time(now.config.last_modify_time * 1e6));
    keys.show([...(now.data_keys ?? [])].reverse(), (it) => it.version, makeKey);
    shards.show(now.shards, (it) => it.id, makeShard);
  };
  return { node, update };
}

function makeKey() {
  const [version, state, wrapped, segments, stored] = Array.from({ length: 5 }, () => cell());
  const update = (it) => {
    version.set(it.version === 0 ? 'none' : String(it.version));
    state.set(it.shredded ? 'Destroyed' : it.current ? 'Current' : it.version === 0 ? 'Not encrypted' : 'Older');
    const service = it.service_key_version === null ? null : `service key, version ${it.service_key_version}`;
    wrapped.set(service ?? (it.cmk_version ? `customer key, version ${visible(it.cmk_version)}` : it.version === 0 ? '–' : 'customer key'));
    segments.set(count(it.segments));
    stored.set(bytes(it.bytes_stored));
  };
  return { cells: [version, state, wrapped, segments, stored].map((it) => it.node), update };
}

function makeShard() {
  const [id, status, end, begin] = Array.from({ length: 4 }, () => cell());
  const update = (it) => {
    id.set(String(it.id));
    status.set(it.status === 'readwrite' ? 'Writable' : 'Read-only');
    end.set(count(it.end_seq));
    begin.set(it.begin_key);
  };
  return { cells: [id, status, end, begin].map((it) => it.node), update };
}

function consumers() {
  const empty = el('p', { class: 'muted' }, 'Loading…');
  const node = el('div', { class: 'columns' }, el('section', { class: 'card whole', 'aria-label': 'Consumer groups' }, el('h2', {}, 'Consumer groups'), empty));
  const cards = new Map();
  const update = (now) => {
    if (now.groups === null) {
      setText(empty, 'The access key has no permission to read in this project.');
      return;
    }
    setText(empty, now.groups.length === 0 ? 'There is no consumer group.' : `${count(now.groups.length)} in all. The lag is the number of log groups behind the checkpoint.`);
    const names = new Set(now.groups.map((group) => group.name));
    for (const [name, it] of cards) {
      if (!names.has(name)) {
        it.node.remove();
        cards.delete(name);
      }
    }
    for (const group of now.groups) {
      if (!cards.has(group.name)) {
        const made = groupCard(group.name);
        cards.set(group.name, made);
        node.append(made.node);
      }
      cards.get(group.name).update(group, now.now_us);
    }
  };
  return { node, update };
}

function groupCard(rawName) {
  const name = visible(rawName);
  const about = facts([['lag', 'Lag'], ['consumers', 'Live consumers'], ['timeout', 'Timeout']]);
  const table = new Table(`Shards of ${name}`, [
    { label: 'Shard' }, { label: 'Consumer', class: 'text' }, { label: 'Lag', class: 'number' }, { label: 'Checkpoint', class: 'number' },
  ]);
  const node = card(name, about.node, scrolled(`Shards of ${name}`, table));
  let nowUs = 0;
  const makeRow = () => {
    const [shard, owner, lag, updated] = Array.from({ length: 4 }, () => cell());
    const update = (it) => {
      shard.set(String(it.shard));
      owner.set(it.owner === null ? 'none' : visible(it.owner));
      lag.set(it.lag === null ? 'not known' : count(it.lag));
      updated.set(it.updated_us === null ? 'none' : `${seconds(Math.max(0, (nowUs - it.updated_us) / 1e6))} ago`);
    };
    return { cells: [shard, owner, lag, updated].map((it) => it.node), update };
  };
  const update = (group, now) => {
    nowUs = now;
    about.set('lag', group.lag === null ? 'not known' : `${count(group.lag)} log groups`);
    about.set('consumers', count(group.consumers));
    about.set('timeout', seconds(group.timeout_s));
    table.show(group.shards, (it) => it.shard, makeRow);
  };
  return { node, update };
}

// Appends a text with each hit of the search marked. `wanted` is in lower case.
function marked(node, text, wanted) {
  // A text that has another length in lower case has no places to mark.
  const lower = text.toLowerCase();
  let from = 0;
  if (wanted && lower.length === text.length) {
    for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, from)) {
      node.append(text.slice(from, at), el('mark', {}, text.slice(at, at + wanted.length)));
      from = at + wanted.length;
    }
  }
  node.append(text.slice(from));
}

// A line of the list, which can be shown with and without hits.
class Line {
  constructor(log) {
    this.when = log.time === undefined ? time(log.received_us) : time(log.time * 1e6);
    const meta = [['topic', log.topic], ['source', log.source]].filter(([, text]) => text);
    this.fields = [...log.fields.map(([key, value]) => [visible(key), visible(value)]), ...meta.map(([key, value]) => [`__${key}__`, visible(value)])];
    this.text = this.fields.map(([key, value]) => `${key}: ${value}`).join('\n').toLowerCase();
    this.where = `shard ${log.shard}`;
    this.node = el('li', {});
    this.shown = null;
  }

  // Whether the line has the search in it.
  show(wanted) {
    const matches = this.text.includes(wanted);
    this.node.hidden = !matches;
    if (matches && this.shown !== wanted) {
      this.shown = wanted;
      const fields = this.fields.map(([key, value]) => {
        const [name, content] = [el('span', { class: 'field-name' }), el('span', { class: 'field-value' })];
        marked(name, key, wanted);
        marked(content, value, wanted);
        return el('span', { class: 'pair' }, name, ': ', content);
      });
      this.node.replaceChildren(el('span', { class: 'when' }, this.when, el('span', { class: 'where' }, this.where)), el('span', { class: 'pairs' }, ...fields));
    }
    return matches;
  }
}

// The newest lines, the last one at the bottom.
class Lines {
  constructor() {
    this.lines = [];
    this.wanted = '';
    this.list = el('ol', { class: 'lines' });
    this.box = el('div', { class: 'log', tabindex: '0', role: 'region', 'aria-label': 'Logs, the newest at the bottom' }, this.list);
    this.node = this.box;
  }

  add(logs) {
    const follows = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < 40;
    const added = logs.slice(-LINES_MAX).map((log) => new Line(log));
    for (const line of added) {
      line.show(this.wanted);
    }
    this.list.append(...added.map((line) => line.node));
    this.lines.push(...added);
    for (const gone of this.lines.splice(0, this.lines.length - LINES_MAX)) {
      gone.node.remove();
    }
    if (follows) {
      this.box.scrollTop = this.box.scrollHeight;
    }
  }

  search(text) {
    this.wanted = text.toLowerCase();
    return this.count();
  }

  count() {
    return this.lines.filter((line) => line.show(this.wanted)).length;
  }

  clear() {
    this.lines = [];
    this.list.replaceChildren();
  }
}

function tail({ client, signal, parameters, say, failed }) {
  const lines = new Lines();
  const search = el('input', { id: 'search', type: 'search', placeholder: 'Text in a field', autocomplete: 'off', spellcheck: 'false', maxlength: 256 });
  const pause = el('button', { type: 'button', 'aria-pressed': 'false' }, 'Pause');
  const clear = el('button', { type: 'button' }, 'Clear');
  const status = el('p', { class: 'muted small', id: 'tail-status' }, 'Waiting for logs…');
  const waiting = [];
  let [isPaused, missed] = [false, 0];
  const tell = () => {
    const matching = lines.count();
    const shown = lines.wanted ? `${count(matching)} of ${count(lines.lines.length)} logs match` : `${count(lines.lines.length)} logs`;
    const state = isPaused ? `Paused, ${count(waiting.length)} more wait` : 'Live';
    setText(status, `${state}. ${shown}.${missed > 0 ? ` ${count(missed)} logs or groups were left out, because they came too fast.` : ''}`);
  };
  search.addEventListener('input', () => {
    say(`${count(lines.search(search.value))} logs match`);
    tell();
  });
  pause.addEventListener('click', () => {
    isPaused = !isPaused;
    pause.setAttribute('aria-pressed', String(isPaused));
    setText(pause, isPaused ? 'Continue' : 'Pause');
    if (!isPaused) {
      lines.add(waiting.splice(0));
    }
    tell();
  });
  clear.addEventListener('click', () => {
    lines.clear();
    tell();
  });
  let position;
  const { project, logstore: of } = parameters;
  const step = async () => {
    const asked = position === undefined ? { back: BACK } : { position, wait: WAIT_MS };
    const answer = await client.get('tail', { project, logstore: of, ...asked }, signal);
    position = answer.position;
    missed += answer.skipped_groups + answer.left_out;
    if (isPaused) {
      waiting.push(...answer.logs);
      missed += Math.max(0, waiting.length - LINES_MAX);
      waiting.splice(0, waiting.length - LINES_MAX);
    } else {
      lines.add(answer.logs);
      if (answer.logs.length > 0) {
        say(`${count(answer.logs.length)} new logs`);
      }
    }
    tell();
    return answer.logs.length > 0 ? GATHER_MS : 0;
  };
  const problem = el('p', { class: 'notice bad', role: 'status', hidden: true });
  loop(signal, step, (error) => {
    problem.hidden = error === null;
    setText(problem, error === null ? '' : `No logs: ${error.message}`);
    if (error?.code === 'KmsKeyRevoked') {
      // The owner of the key has taken it back, so its logs are not to be read any more.
      lines.clear();
      waiting.length = 0;
      position = undefined;
      setText(status, 'The key is refused, so the logs are no longer shown.');
    }
    // The banner belongs to the other loop of this page, unless the session is over.
    if (error?.endsSession) {
      failed(error);
    }
  });
  const bar = el(
    'div',
    { class: 'toolbar', role: 'search' },
    el('div', { class: 'field' }, el('label', { for: 'search' }, 'Search'), search),
    el('div', { class: 'buttons' }, pause, clear),
  );
  const node = el('section', { class: 'card', 'aria-label': 'Live tail' }, bar, problem, lines.node, status);
  return { node };
}
