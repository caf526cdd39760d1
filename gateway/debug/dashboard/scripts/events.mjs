// Updates the page for each event.

import { addCompletion } from "./charts.mjs";
import { describe, groupOf } from "./describe.mjs";
import { forgetProgress, setProgress } from "./loads.mjs";
import { addToLog } from "./log.mjs";
import { drawLoading, modelsSoon } from "./models.mjs";
import { rememberStart, startOf, statusSoon } from "./requests.mjs";

/** @import { GatewayEvent } from "./shapes" */

/**
 * @param {string} id
 * @param {GatewayEvent} event
 */
export function receive(id, event) {
  const start = event.type === "inference_complete" ? startOf(event.data.requestId) : undefined;
  addToLog({ id, event, group: groupOf(event.type), line: describe(event, start) });
  switch (event.type) {
    case "model_load_progress":
      setProgress(event.data, event.data.progress);
      drawLoading();
      return; // too frequent to fetch the status for each
    case "inference_start":
      rememberStart(event.data);
      break;
    case "inference_complete":
      addCompletion(event.data);
      break;
    case "model_load_start":
      forgetProgress(event.data);
      break;
    case "model_load_complete":
      forgetProgress(event.data);
      modelsSoon();
      break;
    case "model_unload_complete":
    case "model_activate":
    case "model_deactivate":
    case "host_state":
    case "gap":
      modelsSoon();
      break;
  }
  statusSoon();
}
