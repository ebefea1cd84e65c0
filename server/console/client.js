// The calls of the console, each signed in the browser as the SDKs of the service sign theirs.
//
// The secret is imported as a key that no script can read back, and lives as long as this object.
// It is never in storage, in a cookie, in an address, or in a request.

const ALGORITHM = { name: 'HMAC', hash: 'SHA-256' };
const SCHEME = 'SLS4-HMAC-SHA256';
const REGION = 'console';
const SCOPE_END = 'sls/aliyun_v4_request';
// All calls of the console are GET, without a body.
const EMPTY_SHA256 = 'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855';

// A call that takes longer has failed. The longest wait of a call is 25 s.
const PATIENCE_MS = 60_000;

const encoder = new TextEncoder();

// An answer that refuses a call.
export class Refusal extends Error {
  constructor(status, code, message) {
    super(message);
    this.name = 'Refusal';
    this.status = status;
    this.code = code;
  }

  // Whether the access key itself is refused, and not one call.
  get endsSession() {
    return this.code === 'InvalidAccessKeyId' || this.code === 'SignatureNotMatch';
  }
}

function hex(buffer) {
  return Array.from(new Uint8Array(buffer), (byte) => byte.toString(16).padStart(2, '0')).join('');
}

function importKey(bytes) {
  return crypto.subtle.importKey('raw', bytes, ALGORITHM, false, ['sign']);
}

function mac(key, text) {
  return crypto.subtle.sign('HMAC', key, encoder.encode(text));
}

// All characters but the unreserved ones of RFC 3986.
function escape(text) {
  const rest = (it) => `%${it.charCodeAt(0).toString(16).toUpperCase()}`;
  return encodeURIComponent(text).replace(/[!'()*]/g, rest);
}

function queryOf(parameters) {
  return Object.entries(parameters)
    .filter(([, value]) => value !== undefined && value !== null && value !== '')
    .sort(([a], [b]) => (a < b ? -1 : 1))
    .map(([name, value]) => `${name}=${escape(String(value))}`)
    .join('&');
}

export class Client {
  #id;
  #key;
  #ofDay = { day: '', key: null };

  constructor(id, key) {
    this.#id = id;
    this.#key = key;
  }

  // Whether the browser offers what a signature needs. It does so over HTTPS and on loopback.
  static get isPossible() {
    return globalThis.isSecureContext === true && crypto.subtle !== undefined;
  }

  static async withSecret(id, secret) {
    return new Client(id, await importKey(encoder.encode(`aliyun_v4${secret}`)));
  }

  // For a service without access keys, which checks that there is a signature, but not which.
  static async open() {
    return new Client('console', await importKey(crypto.getRandomValues(new Uint8Array(32))));
  }

  async #keyOf(day) {
    if (this.#ofDay.day !== day) {
      let key = this.#key;
      for (const part of [day, REGION, ...SCOPE_END.split('/')]) {
        key = await importKey(await mac(key, part));
      }
      this.#ofDay = { day, key };
    }
    return this.#ofDay.key;
  }

  async #headers(path, query) {
    const date = new Date().toISOString().replace(/[-:]|\.\d+/g, '');
    const day = date.slice(0, 8);
    const scope = `${day}/${REGION}/${SCOPE_END}`;
    const signed = [
      ['host', location.host],
      ['x-log-content-sha256', EMPTY_SHA256],
      ['x-log-date', date],
    ];
    const lines = signed.map(([name, value]) => `${name}:${value}\n`).join('');
    const names = signed.map(([name]) => name).join(';');
    const request = `GET\n${path}\n${query}\n${lines}\n${names}\n${EMPTY_SHA256}`;
    const digest = hex(await crypto.subtle.digest('SHA-256', encoder.encode(request)));
    const key = await this.#keyOf(day);
    const signature = hex(await mac(key, `${SCHEME}\n${date}\n${scope}\n${digest}`));
    return {
      authorization: `${SCHEME} Credential=${this.#id}/${scope},Signature=${signature}`,
      'x-log-content-sha256': EMPTY_SHA256,
      'x-log-date': date,
    };
  }

  // The JSON of an answer. Throws a Refusal, or a TypeError if the service cannot be reached.
  async get(view, parameters, signal = new AbortController().signal) {
    const path = `/console/api/${view}`;
    const query = queryOf(parameters);
    const answer = await fetch(query ? `${path}?${query}` : path, {
      headers: await this.#headers(path, query),
      cache: 'no-store',
      credentials: 'omit',
      redirect: 'error',
      referrerPolicy: 'no-referrer',
      signal: AbortSignal.any([signal, AbortSignal.timeout(PATIENCE_MS)]),
    });
    if (answer.ok) {
      return answer.json();
    }
    const refusal = await answer.json().catch(() => ({}));
    throw new Refusal(
      answer.status,
      refusal.errorCode ?? 'Unknown',
      refusal.errorMessage ?? `the service answered with the status ${answer.status}`,
    );
  }
}
