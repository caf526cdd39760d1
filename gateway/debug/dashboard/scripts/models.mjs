// The models panel: the loaded models and the actions on them.

import { call, messageOf, readJson } from "./api.mjs";
import { coalesced } from "./coalesce.mjs";
import { byId, el, find, reconcile, show, showProblem, write } from "./elements.mjs";
import { number, wholeUnits } from "./format.mjs";
import { drawLoads, isLoading } from "./loads.mjs";
import { notice } from "./notices.mjs";
import { onSignOut, sessionSignal } from "./session.mjs";

/** @import { Listing, LoadedModel } from "./shapes" */

const REFRESH_MS = 30_000;

const list = byId("models");

/** @type {Listing | null} The latest response of /admin/models. */
let listing = null;
let listedAt = -Infinity;
let live = false;

onSignOut(() => {
  listing = null;
  list.replaceChildren();
});

export function currentListing() {
  return listing;
}

/**
 * Enable the panel while the dashboard is connected. Otherwise its data is stale and its buttons
 * would fail.
 *
 * @param {boolean} connected
 */
export function enableModels(connected) {
  live = connected;
  for (const node of [list, byId("loads")]) node.inert = !live;
  drawLoadButton();
}

export const modelsSoon = coalesced(async () => {
  const signal = sessionSignal();
  let problem = "";
  try {
    const latest = await readJson("../admin/models");
    if (!signal.aborted) listing = latest;
  } catch (fault) {
    problem = messageOf(fault);
  }
  if (signal.aborted) return;
  showProblem(byId("models-problem"), problem);
  listedAt = performance.now();
  list.classList.toggle("stale", problem !== "");
  drawModels();
}, 500);

/** Poll at intervals: there is no event when LM Studio unloads a model by itself. */
export function refreshModels() {
  if (performance.now() - listedAt > REFRESH_MS) modelsSoon();
}

/** Draw the loads in progress, and the hint that no models are loaded. */
export function drawLoading() {
  drawLoads();
  drawHint();
}

function drawModels() {
  drawLoadButton();
  if (listing === null) return;
  reconcile(list, listing.loaded, (model) => model.identifier, modelRow, updateRow);
  drawHint();
}

function drawLoadButton() {
  byId("load-open", HTMLButtonElement).disabled = !live || listing === null;
}

function drawHint() {
  if (listing) show(byId("models-empty"), !listing.loaded.length && !isLoading());
}

/** @param {LoadedModel} model */
function modelRow(model) {
  const { identifier: instanceId, modelKey } = model;
  const activate = el("button", { type: "button" });
  activate.onclick = () => {
    if (isActive(model)) act(activate, "deactivate", {});
    else act(activate, "activate", { modelKey, instanceId });
  };
  const unload = el("button", { type: "button", className: "danger" }, "Unload");
  unload.onclick = () => confirmUnload(model);
  unload.setAttribute("aria-label", `Unload ${instanceId}`);
  const who = el("div", { className: "who" },
    el("span", { className: "name" }, instanceId),
    el("span", { className: "tag" }),
    el("div", { className: "facts" }),
  );
  return el("li", {}, who, el("div", { className: "acts" }, activate, unload));
}

/**
 * @param {HTMLElement} row
 * @param {LoadedModel} model
 */
function updateRow(row, model) {
  const active = isActive(model);
  const tag = find(row, ".tag");
  tag.classList.toggle("on", active);
  write(tag, active ? "active" : model.type);
  const facts = factsOf(model, active);
  reconcile(find(row, ".facts"), facts, (fact) => fact, (fact) => el("span", {}, fact));
  const button = find(row, "button");
  write(button, active ? "Deactivate" : "Activate");
  button.setAttribute("aria-label", `${active ? "Deactivate" : "Activate"} ${model.identifier}`);
}

/**
 * @param {LoadedModel} model
 * @param {boolean} active
 */
function factsOf(model, active) {
  const { identifier, modelKey, contextLength, ttlMs } = model;
  const defaults = active ? Object.entries(listing?.active?.defaultInference ?? {}) : [];
  return [
    identifier === modelKey ? "" : modelKey,
    contextLength ? `context ${number(contextLength)}` : "",
    ttlMs ? `unloads after ${wholeUnits(ttlMs)} idle` : "stays loaded",
    ...defaults.map(([name, value]) => `${name} ${JSON.stringify(value)}`),
  ].filter(Boolean);
}

/** @param {LoadedModel} model */
function isActive({ identifier, modelKey }) {
  const active = listing?.active;
  if (!active) return false;
  if (active.instanceId) return active.instanceId === identifier;
  return active.modelKey === modelKey || active.modelKey === identifier;
}

/**
 * Send one of the quick admin requests and show its result.
 *
 * @param {HTMLButtonElement} button disabled until the response arrives
 * @param {"activate" | "deactivate" | "unload"} action
 * @param {object} body
 */
async function act(button, action, body) {
  const signal = sessionSignal();
  button.disabled = true;
  try {
    const result = await (await call(`../admin/models/${action}`, { body })).json();
    notice(result.message ?? "No model is active.");
  } catch (fault) {
    if (!signal.aborted) notice(`Can't ${action}: ${messageOf(fault)}`, true);
  } finally {
    button.disabled = false;
    modelsSoon();
  }
}

/** @param {LoadedModel} model */
function confirmUnload({ identifier: instanceId, modelKey }) {
  const dialog = byId("unload-dialog", HTMLDialogElement);
  const confirm = byId("unload-go", HTMLButtonElement);
  const text = `${instanceId} will be removed from memory. Requests that use it now will fail.`;
  write(byId("unload-text"), text);
  confirm.onclick = () => {
    dialog.close();
    act(confirm, "unload", { modelKey, instanceId });
  };
  dialog.showModal();
}
