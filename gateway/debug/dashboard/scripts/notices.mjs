// Shows short messages in the corner of the page.

import { byId, el } from "./elements.mjs";
import { onSignOut } from "./session.mjs";

const MAX_NOTICES = 4;
const SHOWN_MS = 8000;

const list = byId("notices");
onSignOut(() => list.replaceChildren());

/**
 * Show a message for a few seconds; a failure stays until it is dismissed.
 *
 * @param {string} text
 */
export function notice(text, failed = false) {
  const node = el("div", { className: failed ? "notice failed" : "notice" }, el("p", {}, text));
  const close = el("button", { type: "button", onclick: () => node.remove() }, "✕");
  close.setAttribute("aria-label", "Dismiss");
  node.append(close);
  list.append(node);
  while (list.children.length > MAX_NOTICES) list.firstChild?.remove();
  if (!failed) setTimeout(() => node.remove(), SHOWN_MS);
}
