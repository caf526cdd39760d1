// Switches between the three views: sign-in, the models of an inference key, and the dashboard.

import { ApiError, messageOf, readJson } from "./api.mjs";
import { showConnection } from "./connection.mjs";
import { byId, el, reconcile, show, showProblem, write } from "./elements.mjs";
import { healthSoon, hideHealth } from "./health.mjs";
import { currentKey, onSignOut, sessionSignal, signOut } from "./session.mjs";

/** @typedef {"sign-in" | "restricted" | "dashboard"} View */

const VIEWS = /** @type {const} */ (["sign-in", "restricted", "dashboard"]);

const usable = byId("usable");
onSignOut(() => usable.replaceChildren());

/** @param {View} view */
export function showView(view) {
  for (const id of VIEWS) show(byId(id), id === view);
  show(byId("forget"), currentKey() !== "" && view !== "sign-in");
}

/**
 * Sign out and ask for a key.
 *
 * @param {string} problem why the previous key was rejected, if it was
 */
export function askForKey(problem) {
  signOut();
  showView("sign-in");
  showConnection("", "Not signed in");
  show(byId("trouble"), false);
  hideHealth();
  write(byId("sign-in-problem"), problem);
  byId("key").focus();
}

/**
 * Show what an inference key can see: the key is valid, but not an admin key.
 *
 * @param {ApiError} refusal
 */
export async function showRestricted(refusal) {
  const signal = sessionSignal();
  showView("restricted");
  showConnection("warn", "Inference only");
  show(byId("trouble"), false);
  write(byId("restricted-why"), `The gateway responded: ${refusal.message}`);
  healthSoon();
  try {
    /** @type {{ data: { id: string }[] }} */
    const { data } = await readJson("../v1/models");
    showProblem(byId("usable-problem"), "");
    const row = (/** @type {string} */ id) => el("li", {}, el("span", { className: "mono" }, id));
    reconcile(usable, data, (model) => model.id, (model) => row(model.id));
  } catch (fault) {
    if (!signal.aborted) showProblem(byId("usable-problem"), messageOf(fault));
  }
}
