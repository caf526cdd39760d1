// The requests panel: requests in flight and recent ones.

import { ApiError, readJson } from "./api.mjs";
import { coalesced } from "./coalesce.mjs";
import { byId, el, find, reconcile, rowsOf, show, showProblem, write } from "./elements.mjs";
import { duration, joined, number, plural, wholeUnits } from "./format.mjs";
import { drawLoadTimes, setLoads } from "./loads.mjs";
import { drawLoading } from "./models.mjs";
import { onSignOut, sessionSignal } from "./session.mjs";

/** @import { InferenceComplete, InferenceStart, InFlight, Status } from "./shapes" */
/** @typedef {Exclude<InFlight, { operation: "model_load" }>} Running */

/** How often the status is polled, with and without requests or loads in flight. */
const REFRESH_BUSY_MS = 2000;
const REFRESH_IDLE_MS = 15_000;
const MAX_ROWS = 50;
const MAX_STARTS = 2000;

const inFlightList = byId("running");
const recentList = byId("recent");

/** @type {Status | null} The latest response of /debug/status. */
let status = null;
let statusAt = -Infinity;
/** @type {Running[]} The requests in flight of `status`. */
let running = [];
/** @type {Map<string, InferenceStart>} By request id: later events lack the model and path. */
const starts = new Map();

onSignOut(() => {
  status = null;
  running = [];
  starts.clear();
  for (const list of [inFlightList, recentList]) list.replaceChildren();
});

/** @param {InferenceStart} start */
export function rememberStart(start) {
  starts.set(start.requestId, start);
  const [oldest] = starts.keys();
  if (starts.size > MAX_STARTS && oldest !== undefined) starts.delete(oldest);
}

/** @param {string} requestId */
export function startOf(requestId) {
  return starts.get(requestId);
}

/**
 * Disable the list while the dashboard is not connected.
 *
 * @param {boolean} connected
 */
export function enableRequests(connected) {
  inFlightList.inert = !connected;
}

export const statusSoon = coalesced(async () => {
  const signal = sessionSignal();
  /** @type {Status} */
  let latest;
  try {
    latest = await readJson("status");
  } catch (fault) {
    // without a response the event stream fails as well, and reports it
    if (signal.aborted || !(fault instanceof ApiError) || !fault.status) return;
    showProblem(byId("status-problem"), fault.message);
    return;
  }
  if (signal.aborted) return;
  status = latest;
  statusAt = performance.now();
  showProblem(byId("status-problem"), status.error);
  drawStatus(status);
}, 500);

export function refreshStatus() {
  const interval = status?.inFlight.length ? REFRESH_BUSY_MS : REFRESH_IDLE_MS;
  if (performance.now() - statusAt > interval) statusSoon();
}

/** @param {Status} latest */
function drawStatus({ inFlight, recentRequests = [], totalRequests, totalErrors }) {
  running = inFlight.filter((one) => one.operation !== "model_load");
  setLoads(inFlight.filter((one) => one.operation === "model_load"));
  byId("totals").replaceChildren(
    total(running.length, "in flight"),
    total(totalRequests, "since startup"),
    total(totalErrors, "failed", totalErrors ? "bad" : ""),
  );
  const shown = running.slice(0, MAX_ROWS);
  reconcile(inFlightList, shown, (one) => one.requestId, runningRow, updateTokens);
  show(byId("running-empty"), !running.length);
  const keyOf = (/** @type {InferenceComplete} */ one) => `${one.requestId} ${one.timestamp}`;
  reconcile(recentList, recentRequests, keyOf, recentRow, updateName);
  show(byId("recent-empty"), !recentRequests.length);
  drawLoading();
  drawElapsed();
}

/**
 * @param {number} count
 * @param {string} label
 */
function total(count, label, className = "") {
  return el("span", {}, el("b", { className }, number(count)), ` ${label}`);
}

/** @param {Running} request */
function runningRow({ model, method, path, stream, client, requestId }) {
  const facts = [`${method} ${path}`, stream ? "stream" : "no stream", client, requestId];
  const spans = facts.filter(Boolean).map((fact) => el("span", {}, fact));
  const who = el("div", { className: "who" },
    el("span", { className: "name" }, model || "no model named"),
    el("div", { className: "facts" }, ...spans),
  );
  return el("li", {},
    el("span", { className: "pulse" }),
    who,
    el("span", { className: "tokens dim" }),
    el("span", { className: "time" }),
  );
}

/**
 * Show how far a stream has come: models send about one token per chunk.
 *
 * @param {HTMLElement} row
 * @param {Running} request
 */
function updateTokens(row, { chunks }) {
  write(find(row, ".tokens"), chunks ? `≈ ${plural(chunks, "token")}` : "");
}

/** @param {InferenceComplete} request */
function recentRow({ status: code, cancelled, tokenUsage, tokensPerSec, totalTimeMs }) {
  const kind = cancelled ? "warn" : code >= 400 ? "bad" : "good";
  const tokens = tokenUsage?.completionTokens;
  const facts = joined(
    cancelled ? "client disconnected" : "",
    tokens ? plural(tokens, "token") : "",
    tokensPerSec ? `${number(tokensPerSec, 1)}/s` : "",
  );
  return el("li", {},
    el("span", { className: `status ${kind}` }, String(code)),
    el("span", { className: "who" }),
    el("span", { className: "dim" }, facts),
    el("span", { className: "time" }, duration(totalTimeMs)),
  );
}

/**
 * Show the request's model, which may become known only after the row was created.
 *
 * @param {HTMLElement} row
 * @param {InferenceComplete} request
 */
function updateName(row, { requestId }) {
  const start = startOf(requestId);
  write(find(row, ".who"), start?.model || start?.path || requestId);
}

/** Update the elapsed times between two statuses. */
export function drawElapsed() {
  if (!status) return;
  const since = performance.now() - statusAt;
  rowsOf(inFlightList).forEach((row, place) => {
    const request = running[place];
    if (request) write(find(row, ".time"), wholeUnits(request.elapsedMs + since));
  });
  drawLoadTimes(since);
}
