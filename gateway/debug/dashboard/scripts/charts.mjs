// The three charts: requests, tokens per second and latency of the last ten minutes.

import { barsPath, bucketed, CHART_MS, chartEnd, median } from "./chart_math.mjs";
import { byId, write } from "./elements.mjs";
import { duration, number } from "./format.mjs";
import { onSignOut } from "./session.mjs";

/** @import { Completion } from "./chart_math.mjs" */
/** @import { InferenceComplete } from "./shapes" */

/** The large figures are medians over this many of the latest requests. */
const RECENT = 20;

/** @type {Completion[]} */
let completions = [];
/** The gateway's clock minus the browser's, in milliseconds. */
let clockOffset = 0;

onSignOut(() => { completions = []; });

/** @param {string} timestamp the current time on the gateway */
export function setClock(timestamp) {
  clockOffset = Date.parse(timestamp) - Date.now();
}

/** @param {InferenceComplete} data */
export function addCompletion({ timestamp, totalTimeMs, ttftMs, tokensPerSec, status, cancelled }) {
  completions.push({
    at: Date.parse(timestamp),
    total: totalTimeMs,
    first: ttftMs,
    speed: tokensPerSec,
    failed: status >= 400 && !cancelled,
  });
  // drawing discards old ones, but a hidden tab is not drawn
  if (completions.length > 20_000) completions = completions.slice(-10_000);
}

export function drawCharts() {
  const now = Date.now() + clockOffset;
  const end = chartEnd(now);
  completions = completions.filter((one) => one.at > end - CHART_MS);
  const buckets = bucketed(completions, end);
  const recent = completions.slice(-RECENT);
  /** @param {"total" | "first" | "speed"} name */
  const medians = (name) => buckets.map((bucket) => median(bucket, name) ?? 0);

  write(byId("requests-now"), number(completions.filter((one) => one.at > now - 60_000).length));
  const counts = buckets.map((bucket) => bucket.length);
  const failures = buckets.map((bucket) => bucket.filter((one) => one.failed).length);
  drawBars("requests", [counts, failures], (peak) => `peak ${number(peak)} in 10 s`);

  const speed = median(recent, "speed");
  write(byId("speed-now"), speed === null ? "–" : number(speed, 1));
  write(byId("speed-more"), speed === null ? "none yet" : `median of the last ${RECENT}`);
  drawBars("speed", [medians("speed")], (peak) => `peak ${number(peak, 1)}`);

  const first = median(recent, "first");
  write(byId("latency-now"), duration(median(recent, "total")));
  write(byId("latency-more"), first === null ? "" : duration(first));
  drawBars("latency", [medians("total"), medians("first")], (peak) => `peak ${duration(peak)}`);
}

/**
 * Draw several series on top of one another, on the same scale.
 *
 * @param {string} name the prefix of the chart's ids
 * @param {number[][]} series
 * @param {(peak: number) => string} describePeak
 */
function drawBars(name, series, describePeak) {
  const svg = byId(`${name}-chart`, SVGSVGElement);
  const peak = Math.max(...series.flat());
  series.forEach((values, place) => svg.children[place]?.setAttribute("d", barsPath(values, peak)));
  const text = peak ? describePeak(peak) : "";
  write(byId(`${name}-peak`), text);
  svg.setAttribute("aria-label", `Last 10 minutes: ${text || "no data"}`);
}
