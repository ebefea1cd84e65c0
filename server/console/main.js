// Signing in and out, and which view is shown.

import { Client, Refusal } from '/console/client.js';
import { Announcer, el, setText } from '/console/view.js';
import { logstores } from '/console/logstores.js';
import { logstore } from '/console/logstore.js';
import { audit } from '/console/audit.js';

// Without any input for so long, the console signs out.
const IDLE_MS = 30 * 60 * 1000;

const byId = (id) => document.getElementById(id);
const [main, nav, banner, who, place, signOutButton] = ['main', 'nav', 'banner', 'who', 'place', 'sign-out'].map(byId);
const announcer = new Announcer(byId('announcer'));
const isOpen = document.documentElement.dataset.access === 'open';

// The client and the caller of this session, or null.
let session = null;
let view = null;
let lastInput = Date.now();

function show(node, title) {
  document.title = `${title} – envelog console`;
  main.replaceChildren(node);
}

function warn(text) {
  banner.hidden = text === null;
  setText(banner, text ?? '');
}

function stopView() {
  view?.abort();
  view = null;
}

function signOut(reason) {
  stopView();
  const wasIn = session !== null;
  session = null;
  nav.hidden = true;
  signOutButton.hidden = true;
  setText(who, '');
  setText(place, '');
  warn(null);
  if (isOpen && !wasIn) {
    enterOpen();
  } else {
    signInForm(reason);
  }
}

// The reason of a refused sign-in, for the person who has typed the key.
function explain(error) {
  if (!(error instanceof Refusal)) {
    return 'The service does not answer. Check the address, and that the service runs.';
  }
  switch (error.code) {
    case 'InvalidAccessKeyId':
      return 'This access key id does not exist in the service. Check the id.';
    case 'SignatureNotMatch':
      return 'The secret does not belong to this access key id. Check the secret.';
    case 'RequestTimeTooSkewed':
      return 'The clock of this computer and that of the service differ by more than 15 minutes. Set the clock.';
    default:
      return `The service refuses: ${error.message} (${error.code}).`;
  }
}

async function enter(client) {
  const caller = await client.get('session', {});
  session = { client, caller };
  lastInput = Date.now();
  nav.hidden = false;
  signOutButton.hidden = isOpen;
  byId('nav-audit').hidden = !caller.audit;
  setText(who, caller.key ? `Key ${caller.key.id}` : 'No access keys');
  setText(place, caller.region);
  route();
}

function insecure() {
  const message = 'This browser signs requests only over HTTPS and on loopback addresses. Open the console by https, or as localhost on the machine of the service.';
  show(el('section', { class: 'card sign-in' }, el('h1', {}, 'Sign in'), el('p', { role: 'alert', class: 'notice bad' }, message)), 'Sign in');
}

async function enterOpen() {
  if (!Client.isPossible) {
    insecure();
    return;
  }
  try {
    await enter(await Client.open());
    warn('This service has no access keys: every program on this machine may do everything.');
  } catch (error) {
    show(el('section', { class: 'card sign-in' }, el('h1', {}, 'Console'), el('p', { role: 'alert', class: 'notice bad' }, explain(error))), 'Console');
  }
}

function signInForm(reason) {
  if (!Client.isPossible) {
    insecure();
    return;
  }
  const input = (id, label, type) => {
    const field = el('input', { id, name: id, type, required: true, autocomplete: 'off', autocapitalize: 'none', spellcheck: 'false', maxlength: 1024 });
    return { field, node: el('div', { class: 'field' }, el('label', { for: id }, label), field) };
  };
  const id = input('key-id', 'Access key id', 'text');
  const secret = input('key-secret', 'Access key secret', 'password');
  const problem = el('p', { class: 'notice bad', role: 'alert', id: 'problem', hidden: true });
  const button = el('button', { type: 'submit', class: 'primary' }, 'Sign in');
  const refuse = (text) => {
    problem.hidden = false;
    setText(problem, text);
  };
  const form = el(
    'form',
    { method: 'post', 'aria-describedby': 'about-secret' },
    id.node,
    secret.node,
    problem,
    button,
    el('p', { class: 'muted small', id: 'about-secret' }, 'The secret stays in this tab, as a key that scripts cannot read back. It is never sent: each request carries a signature. It is gone when the page is closed or loaded again.'),
  );
  form.addEventListener('submit', async (event) => {
    event.preventDefault();
    problem.hidden = true;
    button.disabled = true;
    const typed = [id.field.value.trim(), secret.field.value];
    secret.field.value = '';
    try {
      await enter(await Client.withSecret(...typed));
    } catch (error) {
      refuse(explain(error));
      const wrong = error.code === 'InvalidAccessKeyId' ? id.field : secret.field;
      wrong.focus();
    } finally {
      button.disabled = false;
    }
  });
  show(el('section', { class: 'card sign-in', 'aria-labelledby': 'sign-in-title' }, el('h1', { id: 'sign-in-title' }, 'Sign in'), el('p', {}, 'Read-only view of this log service. Use an access key of the service.'), form), 'Sign in');
  if (reason) {
    refuse(reason);
  }
  id.field.focus();
}

// Told of each failure of a view, and of its end (null). Returns whether the session is over.
function failed(error) {
  if (error === null) {
    warn(isOpen ? 'This service has no access keys: every program on this machine may do everything.' : null);
  } else if (error instanceof Refusal) {
    if (error.endsSession) {
      signOut(`Signed out: ${explain(error)}`);
      return;
    }
    warn(`${error.message} (${error.code})`);
  } else if (error instanceof TypeError || error.name === 'TimeoutError') {
    warn('The service does not answer. The console tries again by itself.');
  } else {
    throw error;
  }
}

// The view that an address names.
function viewOf(hash) {
  const parts = hash.replace(/^#\/?/, '').split('/').map((part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  });
  if (parts[0] === 'audit' && session.caller.audit) {
    return { name: 'audit', make: audit };
  }
  if (parts[0] === 'logstore' && parts.length >= 3) {
    return { name: 'logstores', make: logstore, parameters: { project: parts[1], logstore: parts[2], tab: parts[3] ?? '' } };
  }
  return { name: 'logstores', make: logstores };
}

function route() {
  if (session === null) {
    return;
  }
  stopView();
  const { name, make, parameters } = viewOf(location.hash);
  for (const link of nav.querySelectorAll('a')) {
    const isHere = link.id === `nav-${name}`;
    if (isHere) {
      link.setAttribute('aria-current', 'page');
    } else {
      link.removeAttribute('aria-current');
    }
  }
  view = new AbortController();
  const context = { ...session, signal: view.signal, failed, say: (text) => announcer.say(text), parameters };
  const { node, title } = make(context);
  show(node, title);
  const heading = node.querySelector('h1');
  heading?.setAttribute('tabindex', '-1');
  heading?.focus({ preventScroll: true });
}

function watchInput() {
  for (const kind of ['keydown', 'pointerdown', 'wheel']) {
    addEventListener(kind, () => { lastInput = Date.now(); }, { passive: true, capture: true });
  }
  setInterval(() => {
    if (session !== null && !isOpen && Date.now() - lastInput > IDLE_MS) {
      signOut('Signed out: this page was not used for 30 minutes.');
    }
  }, 1000);
}

byId('skip').addEventListener('click', (event) => {
  event.preventDefault();
  main.focus();
});
signOutButton.addEventListener('click', () => signOut(null));
addEventListener('hashchange', route);
// The page may be kept in memory after the tab has gone elsewhere.
addEventListener('pagehide', () => { if (!isOpen) { signOut(null); } });
watchInput();
signOut(null);
