// The state of the connection to the gateway, and what depends on it.

import { byId, write } from "./elements.mjs";
import { enableModels } from "./models.mjs";
import { enableRequests } from "./requests.mjs";

const pill = byId("connection");
let live = false;

/** Whether the event stream is connected, so that the page is up to date. */
export function isLive() {
  return live;
}

/**
 * @param {"good" | "warn" | "bad" | ""} state
 * @param {string} text
 */
export function showConnection(state, text) {
  live = state === "good";
  pill.dataset.is = state;
  write(pill, text);
  enableModels(live);
  enableRequests(live);
}
