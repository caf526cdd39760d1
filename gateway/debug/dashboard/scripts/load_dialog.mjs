// The dialog that loads a model.

import { ApiError, call, messageOf } from "./api.mjs";
import { errorText } from "./describe.mjs";
import { byId, el, show, write } from "./elements.mjs";
import { duration, fileSize, joined, modelName, number } from "./format.mjs";
import { own } from "./loads.mjs";
import { currentListing, modelsSoon } from "./models.mjs";
import { notice } from "./notices.mjs";
import { statusSoon } from "./requests.mjs";
import { sessionSignal } from "./session.mjs";
import { serverSentEvents } from "./sse.mjs";

/** @import { Loaded, LoadRequest } from "./shapes" */

const dialog = byId("load-dialog", HTMLDialogElement);
const model = byId("load-model", HTMLSelectElement);
const instance = byId("load-instance", HTMLInputElement);
const context = byId("load-context", HTMLInputElement);
const ttl = byId("load-ttl", HTMLSelectElement);
const gpu = byId("load-gpu", HTMLSelectElement);
const ratio = byId("load-ratio", HTMLInputElement);
const activate = byId("load-activate", HTMLInputElement);
const submit = byId("load-go", HTMLButtonElement);
const problem = byId("load-problem");

/** @type {AbortController | null} The load that the open dialog is waiting for. */
let awaited = null;

byId("load-open").onclick = openDialog;
dialog.onclose = release;
model.onchange = describeChoice;
gpu.onchange = () => show(byId("load-ratio-label"), gpu.value === "fraction");
ratio.oninput = () => write(byId("load-ratio-text"), ratio.value);
byId("load-form").onsubmit = (event) => {
  event.preventDefault();
  load(loadRequest());
};

function openDialog() {
  const chosen = model.value;
  const models = currentListing()?.downloaded ?? [];
  model.replaceChildren(...models.map(({ modelKey, displayName, paramsString, size }) => {
    const text = joined(displayName ?? modelKey, paramsString, fileSize(size));
    return el("option", { value: modelKey }, text);
  }));
  if (models.some(({ modelKey }) => modelKey === chosen)) model.value = chosen;
  write(problem, "");
  describeChoice();
  dialog.showModal();
}

function describeChoice() {
  const chosen = currentListing()?.downloaded.find(({ modelKey }) => modelKey === model.value);
  const most = chosen?.maxContextLength;
  const facts = joined(chosen?.modelKey, chosen?.type, most ? `context up to ${number(most)}` : "");
  write(byId("load-facts"), facts);
  context.max = most ? String(most) : "";
}

/** The request that the form describes. */
function loadRequest() {
  /** @type {LoadRequest} */
  const body = { modelKey: model.value, activate: activate.checked, loadConfig: {} };
  const instanceId = instance.value.trim();
  if (instanceId) body.instanceId = instanceId;
  if (context.value) body.loadConfig.contextLength = Number(context.value);
  if (gpu.value) {
    body.loadConfig.gpu = { ratio: gpu.value === "fraction" ? Number(ratio.value) : gpu.value };
  }
  if (ttl.value) body.ttlSeconds = Number(ttl.value);
  return body;
}

/**
 * Load a model and show the result. An error appears in the dialog if that is still open.
 *
 * @param {LoadRequest} body
 */
async function load(body) {
  const session = sessionSignal();
  const controller = new AbortController();
  const abort = () => controller.abort();
  session.addEventListener("abort", abort);
  const disown = own(body, controller);
  awaited = controller;
  submit.disabled = true;
  write(problem, "");
  try {
    const result = await loaded(body, controller);
    const done = `${modelName(result)} was loaded in ${duration(result.totalTimeMs)}.`;
    notice([done, ...result.warnings].join(" "));
  } catch (fault) {
    if (session.aborted) return;
    const name = modelName(body);
    if (controller.signal.aborted) notice(`Loading ${name} was cancelled.`);
    else if (awaited === controller) write(problem, messageOf(fault));
    else notice(`Loading ${name} failed: ${messageOf(fault)}`, true);
  } finally {
    session.removeEventListener("abort", abort);
    disown();
    if (awaited === controller) release();
    statusSoon();
    modelsSoon();
  }
}

/**
 * Load a model and return the result. The response is a stream of events, so that the connection
 * is never idle for so long that a proxy closes it. The first event shows that the load has
 * started, and closes the dialog.
 *
 * @param {LoadRequest} body
 * @param {AbortController} controller
 * @returns {Promise<Loaded>}
 */
async function loaded(body, controller) {
  const { signal } = controller;
  const headers = { Accept: "text/event-stream" };
  const response = await call("../admin/models/load", { body, headers, signal });
  try {
    for await (const frame of serverSentEvents(response)) {
      if (frame === null) continue;
      const data = JSON.parse(frame.data);
      if (frame.event === "error") throw new ApiError(errorText(data), data.status);
      if (awaited === controller) dialog.close();
      if (frame.event === "model_load_complete") return data;
    }
  } catch (fault) {
    if (signal.aborted || fault instanceof ApiError) throw fault;
  }
  throw new ApiError("The connection was lost before the load was complete.");
}

/** The dialog no longer waits for a load: its form can be submitted again. */
function release() {
  awaited = null;
  submit.disabled = false;
}
