// Describes events and errors in words.

import { duration, joined, modelName, number, plural } from "./format.mjs";

/** @import { ErrorBody, GatewayEvent, InferenceComplete, InferenceStart } from "./shapes" */

/** The groups of the event log's filter buttons. */
export const GROUPS = {
  requests: ["inference_start", "inference_complete"],
  loads: ["model_load_start", "model_load_complete"],
  progress: ["model_load_progress"],
  unloads: ["model_unload_start", "model_unload_complete"],
  activations: ["model_activate", "model_deactivate"],
  errors: ["error", "gap", "host_state"],
};

const GROUP_OF = new Map(
  Object.entries(GROUPS).flatMap(([group, types]) => types.map((type) => [type, group])),
);

/**
 * The group of an event type; empty for a type that this dashboard does not know.
 *
 * @param {string} type
 */
export function groupOf(type) {
  return GROUP_OF.get(type) ?? "";
}

/**
 * One line about an event.
 *
 * @param {GatewayEvent} event
 * @param {InferenceStart} [start] the start of the request that an inference_complete belongs to
 */
export function describe(event, start) {
  // a newer gateway may send other types, which the type of `event` does not have
  const { data: unknown } = event;
  switch (event.type) {
    case "inference_start": {
      const { method, path, model, stream, client } = event.data;
      return joined(`${method} ${path}`, model, stream ? "stream" : "", client);
    }
    case "inference_complete":
      return describeCompletion(event.data, start);
    case "model_load_start":
      return joined(modelName(event.data), JSON.stringify(event.data.loadConfig));
    case "model_load_progress":
      return joined(modelName(event.data), `${event.data.progress} %`);
    case "model_load_complete": {
      const { totalTimeMs, activated } = event.data;
      return joined(modelName(event.data), duration(totalTimeMs), activated ? "activated" : "");
    }
    case "model_unload_complete":
      return joined(modelName(event.data), duration(event.data.totalTimeMs));
    case "model_activate":
      return joined(modelName(event.data), JSON.stringify(event.data.defaultInference));
    case "model_unload_start":
    case "model_deactivate":
      return modelName(event.data);
    case "error": {
      const { operation, error, totalTimeMs } = event.data;
      return joined(operation, error, totalTimeMs ? `after ${duration(totalTimeMs)}` : "");
    }
    case "host_state": {
      const { host, state, reason } = event.data;
      return joined(`LM Studio (${host}) is ${state}`, reason);
    }
    case "gap":
      return `${plural(event.data.missed, "event")} missed`;
    default:
      return JSON.stringify(unknown);
  }
}

/**
 * @param {InferenceComplete} data
 * @param {InferenceStart | undefined} start
 */
function describeCompletion(data, start) {
  const { status, cancelled, totalTimeMs, ttftMs, tokenUsage, tokensPerSec } = data;
  const tokens = tokenUsage?.completionTokens;
  // a response that is not streamed arrives all at once, so its first byte adds nothing
  const showFirstByte = ttftMs !== null && start?.stream !== false;
  return joined(
    cancelled ? `${status} client disconnected` : status,
    duration(totalTimeMs),
    showFirstByte ? `first byte ${duration(ttftMs)}` : "",
    tokens ? plural(tokens, "token") : "",
    tokensPerSec ? `${number(tokensPerSec, 1)} tokens/s` : "",
    start?.model,
  );
}

/**
 * The text of an error body in either dialect of the gateway, with the fields that it names.
 *
 * @param {ErrorBody} body
 */
export function errorText({ error, details = [] }) {
  const text = typeof error === "string" ? error : (error?.message ?? "");
  const fields = details.map(({ path, message }) =>
    path.length ? `${path.join(".")}: ${message}` : message,
  );
  return fields.length ? `${text}: ${fields.join("; ")}` : text;
}
