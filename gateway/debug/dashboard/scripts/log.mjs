// The event log, with its filters and its Pause button.

import { GROUPS } from "./describe.mjs";
import { byId, el, reconcile, show, write } from "./elements.mjs";
import { number, timeOfDay } from "./format.mjs";
import { onSignOut } from "./session.mjs";

/** @import { GatewayEvent } from "./shapes" */

/**
 * @typedef {object} Entry
 * @property {string} id
 * @property {string} group
 * @property {string} line
 * @property {GatewayEvent} event
 * @property {string} [text] what the text filter searches, computed on first use
 */

/** How many events are kept in memory, and how many of them are shown. */
const KEPT = 2000;
const SHOWN = 300;
/** The log is redrawn at most this often, however many events arrive. */
const DRAW_INTERVAL_MS = 200;

const rows = byId("log-rows");
const filter = byId("filter", HTMLInputElement);
const pauseButton = byId("pause", HTMLButtonElement);
const hiddenGroups = new Set(["progress"]);

/** @type {Entry[]} Newest last. */
let entries = [];
/** @type {Entry[] | null} What is shown while the log is paused. */
let frozen = null;
let arrivedWhilePaused = 0;
let drawScheduled = false;
let lastDraw = -Infinity;

for (const group of Object.keys(GROUPS)) byId("chips").append(groupButton(group));
filter.oninput = drawLog;
pauseButton.onclick = () => pause(!frozen);
onSignOut(() => {
  entries = [];
  pause(false);
});

/** @param {Entry} entry */
export function addToLog(entry) {
  entries.push(entry);
  arrivedWhilePaused += 1;
  if (entries.length > KEPT * 1.5) entries = entries.slice(-KEPT);
  drawSoon();
}

/** @param {string} group */
function groupButton(group) {
  const button = el("button", { type: "button" }, group);
  const showState = () => {
    button.setAttribute("aria-pressed", String(!hiddenGroups.has(group)));
  };
  button.onclick = () => {
    if (!hiddenGroups.delete(group)) hiddenGroups.add(group);
    showState();
    drawLog();
  };
  showState();
  return button;
}

/** @param {boolean} paused */
function pause(paused) {
  frozen = paused ? entries.slice() : null;
  arrivedWhilePaused = 0;
  write(pauseButton, paused ? "Resume" : "Pause");
  pauseButton.setAttribute("aria-pressed", String(paused));
  drawLog();
}

function drawSoon() {
  if (drawScheduled) return;
  drawScheduled = true;
  // a hidden tab gets no frames, so nothing is drawn until it is visible again
  const nextFrame = () => requestAnimationFrame(() => {
    drawScheduled = false;
    drawLog();
  });
  setTimeout(nextFrame, Math.max(0, lastDraw + DRAW_INTERVAL_MS - performance.now()));
}

function drawLog() {
  lastDraw = performance.now();
  const source = frozen ?? entries;
  const shown = matching(source);
  reconcile(rows, shown, (entry) => entry.id, logRow);
  show(byId("log-empty"), !shown.length);
  write(byId("log-empty"), source.length ? "No events match the filters." : "No events yet.");
  if (!frozen) arrivedWhilePaused = 0;
  const counts = `${number(shown.length)} of ${number(source.length)} shown`;
  write(byId("log-count"), frozen ? `Paused, ${number(arrivedWhilePaused)} new` : counts);
}

/**
 * The newest entries that match the filters, newest first.
 *
 * @param {Entry[]} source
 */
function matching(source) {
  const wanted = filter.value.trim().toLowerCase();
  const found = [];
  for (let place = source.length - 1; place >= 0 && found.length < SHOWN; place -= 1) {
    const entry = /** @type {Entry} */ (source[place]);
    if (hiddenGroups.has(entry.group)) continue;
    if (!wanted || searchText(entry).includes(wanted)) found.push(entry);
  }
  return found;
}

/** @param {Entry} entry */
function searchText(entry) {
  const { event, line } = entry;
  entry.text ??= `${event.type} ${line} ${JSON.stringify(event.data)}`.toLowerCase();
  return entry.text;
}

/** @param {Entry} entry */
function logRow({ id, group, line, event: { type, data } }) {
  const details = el("details", {}, el("summary", {},
    el("span", { className: "dim" }, timeOfDay(data.timestamp)),
    el("span", { className: `type ${group}` }, type),
    el("span", { className: "what" }, line),
  ));
  details.ontoggle = () => {
    // created on demand: most rows are never opened
    if (!details.open || details.children.length > 1) return;
    details.append(el("pre", {}, `id ${id}\n${JSON.stringify(data, null, 2)}`));
  };
  return el("li", {}, details);
}
