// Formats numbers, durations and names.

/** @import { ModelName } from "./shapes" */

/**
 * A number with thousands separators: 32768 is "32,768".
 *
 * @param {number} value
 */
export function number(value, maximumFractionDigits = 0) {
  return value.toLocaleString("en", { maximumFractionDigits });
}

/**
 * A count and its noun: "1 token", "2 tokens".
 *
 * @param {number} count
 * @param {string} noun
 */
export function plural(count, noun) {
  return `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/**
 * A measured duration, precise below a minute; "–" if it is unknown.
 *
 * @param {number | null | undefined} ms
 */
export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
  return wholeUnits(ms);
}

/**
 * The two largest units of a duration, in whole numbers: 90_000 is "1 min 30 s".
 *
 * @param {number} ms
 */
export function wholeUnits(ms) {
  let seconds = Math.round(ms / 1000);
  const parts = [];
  for (const { unit, size } of UNITS) {
    if (seconds >= size && parts.length < 2) parts.push(`${Math.floor(seconds / size)} ${unit}`);
    seconds %= size;
  }
  return parts.join(" ") || "0 s";
}

const UNITS = [
  { unit: "d", size: 86_400 },
  { unit: "h", size: 3600 },
  { unit: "min", size: 60 },
  { unit: "s", size: 1 },
];

/**
 * A file size such as "4.7 GB"; empty if it is unknown.
 *
 * @param {number | null | undefined} bytes
 */
export function fileSize(bytes) {
  return bytes ? `${number(bytes / 1e9, 1)} GB` : "";
}

/**
 * The local time of day with milliseconds: "14:03:59.042".
 *
 * @param {string} timestamp ISO 8601
 */
export function timeOfDay(timestamp) {
  const when = new Date(timestamp);
  return `${when.toLocaleTimeString("en-GB")}.${String(when.getMilliseconds()).padStart(3, "0")}`;
}

/**
 * The parts that are not empty, separated by middle dots.
 *
 * @param {(string | number | null | undefined)[]} parts
 */
export function joined(...parts) {
  return parts.filter((part) => part !== null && part !== undefined && part !== "").join(" · ");
}

/**
 * A model and, if its name differs, its instance: "qwen3-8b as coder".
 *
 * @param {ModelName} model
 */
export function modelName({ modelKey, instanceId }) {
  return instanceId && instanceId !== modelKey ? `${modelKey} as ${instanceId}` : modelKey;
}
