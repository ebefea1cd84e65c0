// The key audit log.

import { Table, count, el, restartable, setText, time, visible } from '/console/view.js';
import { pager } from '/console/logstores.js';

const POLL_MS = 5000;
const PAGE = 100;

const asked = { filter: '', offset: 0 };

function makeRow(it) {
  const name = it.logstore ? visible(it.logstore) : 'The store';
  const texts = [String(it.number), time(it.time_us), it.event.replaceAll('_', ' '), name, visible(it.detail ?? '')];
  // A record never changes.
  return { cells: texts.map((text) => el('span', {}, text)), update: () => {} };
}

export function audit({ client, signal, failed }) {
  let wake = () => {};
  const filter = el('input', { id: 'audit-filter', type: 'search', placeholder: 'Event, Logstore or detail', autocomplete: 'off', spellcheck: 'false', maxlength: 128 });
  filter.value = asked.filter;
  filter.addEventListener('input', () => {
    asked.filter = filter.value.trim();
    asked.offset = 0;
    wake();
  });
  const table = new Table('Key audit log', [
    { label: 'Number' }, { label: 'Time', class: 'nowrap' }, { label: 'Event', class: 'nowrap' }, { label: 'Logstore' }, { label: 'Detail', class: 'wide' },
  ]);
  const state = el('p', { class: 'muted' }, 'The log is being verified…');
  const fault = el('p', { class: 'notice bad', role: 'alert', hidden: true });
  const pages = pager(asked, PAGE, () => wake());
  const step = async () => {
    const answer = await client.get('audit', { filter: asked.filter, offset: asked.offset, size: PAGE }, signal);
    fault.hidden = answer.fault === null;
    state.hidden = answer.fault !== null;
    setText(fault, answer.fault === null ? '' : `The log is not as it was written (${answer.fault}). Run envelog verify, and keep the store as it is.`);
    const newest = answer.searched < answer.total ? ` The newest ${count(answer.searched)} are shown.` : '';
    setText(state, `${count(answer.total)} records, their chain verified at ${time(answer.verified_us)}.${newest}`);
    table.show(answer.records, (it) => it.number, makeRow);
    pages.update(answer.records.length, answer.matching);
    return POLL_MS;
  };
  wake = restartable(signal, step, failed);
  const node = el(
    'div',
    { class: 'view' },
    el('h1', {}, 'Audit log'),
    fault,
    state,
    el(
      'section',
      { class: 'card', 'aria-label': 'Key audit log' },
      el('div', { class: 'toolbar', role: 'search' }, el('div', { class: 'field' }, el('label', { for: 'audit-filter' }, 'Filter'), filter)),
      el('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': 'Records' }, table.node),
      pages.node,
    ),
  );
  return { node, title: 'Audit log' };
}
