// The arithmetic of the charts. All times are milliseconds.

/**
 * A finished request as the charts count it.
 *
 * @typedef {object} Completion
 * @property {number} at when it ended, in milliseconds since 1970 by the gateway's clock
 * @property {number} total
 * @property {number | null} first the time to the first byte
 * @property {number | null} speed tokens per second
 * @property {boolean} failed
 */

/** The time that a chart covers, and the number of its bars. */
export const CHART_MS = 600_000;
export const BUCKETS = 60;

const STEP_MS = CHART_MS / BUCKETS;
const WIDTH = 300;
const HEIGHT = 76;
/** The height of the highest bar, which leaves room above it. */
const MAX_HEIGHT = 70;
const BAR_WIDTH = WIDTH / BUCKETS;
const BAR_GAP = 1.2;

/**
 * The right edge of the chart at a given time. Buckets are aligned to the clock, so that bars move
 * by whole steps and keep their height as they do.
 *
 * @param {number} now
 */
export function chartEnd(now) {
  return Math.ceil(now / STEP_MS) * STEP_MS;
}

/**
 * Sort completions into buckets, oldest first. None may be older than the chart; those after its
 * end, which happens if clocks differ, go into the last bucket.
 *
 * @param {Completion[]} completions
 * @param {number} end
 */
export function bucketed(completions, end) {
  const buckets = Array.from({ length: BUCKETS }, () => /** @type {Completion[]} */ ([]));
  for (const one of completions) {
    const place = Math.floor((one.at - end + CHART_MS) / STEP_MS);
    buckets[Math.min(BUCKETS - 1, place)]?.push(one);
  }
  return buckets;
}

/**
 * The median of one property; null if it is unknown for all of them. For an even count it is the
 * lower of the two middle values, so that it is always a value that occurred.
 *
 * @param {Completion[]} completions
 * @param {"total" | "first" | "speed"} name
 */
export function median(completions, name) {
  const values = completions.map((one) => one[name]).filter((value) => value !== null);
  values.sort((a, b) => a - b);
  return values[Math.floor((values.length - 1) / 2)] ?? null;
}

/**
 * Draw a bar for each value, as the `d` of an SVG path in a view box of 300 by 76. Even the
 * smallest value above 0 is visible.
 *
 * @param {number[]} values
 * @param {number} peak the value of the highest bar
 */
export function barsPath(values, peak) {
  const outlines = values.map((value, place) => {
    if (!value) return "";
    const height = Math.max(2, (value / peak) * MAX_HEIGHT);
    const left = place * BAR_WIDTH + BAR_GAP / 2;
    return `M${left} ${HEIGHT}v-${height.toFixed(1)}h${BAR_WIDTH - BAR_GAP}V${HEIGHT}z`;
  });
  return outlines.join("");
}
