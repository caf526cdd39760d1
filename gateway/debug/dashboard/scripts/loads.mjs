// Shows the loads in progress.

import { byId, el, find, reconcile, rowsOf, show, write } from "./elements.mjs";
import { modelName, wholeUnits } from "./format.mjs";
import { onSignOut } from "./session.mjs";

/** @import { InFlight, ModelName } from "./shapes" */
/** @typedef {Extract<InFlight, { operation: "model_load" }>} Load */

const list = byId("loads");

/** @type {Load[]} From the latest status. */
let loads = [];
/** @type {Map<string, number>} Percentages, by load key. */
const progress = new Map();
/** @type {Map<string, AbortController>} The loads that this page started, by load key. */
const ownLoads = new Map();

onSignOut(() => {
  loads = [];
  progress.clear();
  list.replaceChildren();
});

/** @param {Load[]} inFlight */
export function setLoads(inFlight) {
  loads = inFlight;
}

export function isLoading() {
  return loads.length > 0;
}

/**
 * @param {ModelName} load
 * @param {number} percent
 */
export function setProgress(load, percent) {
  progress.set(loadKey(load), percent);
}

/** @param {ModelName} load */
export function forgetProgress(load) {
  progress.delete(loadKey(load));
}

/**
 * Register a load that this page started, so that its row has a Cancel button. Returns a function
 * that removes it again.
 *
 * @param {ModelName} load
 * @param {AbortController} controller
 */
export function own(load, controller) {
  ownLoads.set(loadKey(load), controller);
  return () => { ownLoads.delete(loadKey(load)); };
}

/**
 * Identifies a load. If LM Studio chooses the instance id, nobody knows it until the load is done.
 *
 * @param {ModelName} load
 */
function loadKey({ modelKey, instanceId }) {
  return `${modelKey}\n${instanceId ?? ""}`;
}

export function drawLoads() {
  reconcile(list, loads, loadKey, loadRow, updateRow);
}

/** @param {Load} load */
function loadRow(load) {
  const bar = el("progress", { max: 100 });
  bar.setAttribute("aria-label", `Loading ${modelName(load)}`);
  const onclick = () => ownLoads.get(loadKey(load))?.abort();
  const cancel = el("button", { type: "button", hidden: true, onclick }, "Cancel");
  cancel.setAttribute("aria-label", `Cancel loading ${modelName(load)}`);
  const facts = el("div", { className: "facts" },
    el("span", { className: "name" }, `Loading ${modelName(load)}`),
    el("span", { className: "percent" }),
    el("span", { className: "since" }),
  );
  return el("li", {}, el("div", { className: "who" }, facts, bar), cancel);
}

/**
 * @param {HTMLElement} row
 * @param {Load} load
 */
function updateRow(row, load) {
  const percent = progress.get(loadKey(load));
  if (percent !== undefined) find(row, "progress", HTMLProgressElement).value = percent;
  write(find(row, ".percent"), percent === undefined ? "" : `${Math.round(percent)} %`);
  show(find(row, "button"), ownLoads.has(loadKey(load)));
}

/**
 * Update the elapsed times between two statuses.
 *
 * @param {number} sinceStatus milliseconds since the latest status
 */
export function drawLoadTimes(sinceStatus) {
  rowsOf(list).forEach((row, place) => {
    const load = loads[place];
    if (load) write(find(row, ".since"), `for ${wholeUnits(load.elapsedMs + sinceStatus)}`);
  });
}
