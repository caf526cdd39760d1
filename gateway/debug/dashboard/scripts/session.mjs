// The current key, and what has to end when the user signs out.
//
// The key is kept in this tab's sessionStorage: never in a URL, a cookie or another tab.

/** The folder of this page. All URLs are relative to it, since a proxy may add a prefix. */
export const HERE = new URL(".", location.href);

const STORAGE = `lmstudio-gateway key ${HERE.pathname}`;

let key = sessionStorage.getItem(STORAGE) ?? "";
let controller = new AbortController();
/** @type {(() => void)[]} */
const resets = [];

/** The current key; empty if the gateway needs none or nobody has signed in. */
export function currentKey() {
  return key;
}

/** Aborted when the session ends. Check it after an `await`, before using the result. */
export function sessionSignal() {
  return controller.signal;
}

/**
 * Register a function that discards data when the user signs out.
 *
 * @param {() => void} reset
 */
export function onSignOut(reset) {
  resets.push(reset);
}

/** @param {string} newKey */
export function signIn(newKey) {
  key = newKey;
  sessionStorage.setItem(STORAGE, key);
}

/** End the session and forget its key. */
export function signOut() {
  disconnect();
  controller = new AbortController();
  sessionStorage.removeItem(STORAGE);
  key = "";
  for (const reset of resets) reset();
}

/** Close all connections, but keep the key. */
export function disconnect() {
  controller.abort();
}
