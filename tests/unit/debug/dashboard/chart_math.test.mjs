import assert from "node:assert/strict";
import { test } from "node:test";

import {
  barsPath,
  bucketed,
  BUCKETS,
  CHART_MS,
  chartEnd,
  median,
} from "../../../../gateway/debug/dashboard/scripts/chart_math.mjs";

const STEP = CHART_MS / BUCKETS;
const END = 1_000 * STEP;

const counts = (times) => bucketed(times.map((at) => ({ at })), END).map((list) => list.length);

test("the chart ends at the next whole step of the clock", () => {
  assert.equal(chartEnd(END), END);
  assert.equal(chartEnd(END - 1), END);
  assert.equal(chartEnd(END + 1), END + STEP);
});

test("completions are put into the bucket of their time, oldest first", () => {
  const found = counts([END - CHART_MS, END - CHART_MS + STEP - 1, END - CHART_MS + STEP, END - 1]);
  const expected = Array(BUCKETS).fill(0);
  expected[0] = 2;
  expected[1] = 1;
  expected[BUCKETS - 1] = 1;
  assert.deepEqual(found, expected);
});

test("a completion from the future is put into the latest bucket", () => {
  assert.equal(counts([END, END + CHART_MS]).at(-1), 2);
});

test("the median is a value that occurred: the lower of the two in the middle", () => {
  const of = (...totals) => median(totals.map((total) => ({ total })), "total");
  assert.equal(of(7), 7);
  assert.equal(of(100, 9, 20), 20);
  assert.equal(of(4, 1, 3, 2), 2);
});

test("the median ignores unknown values", () => {
  assert.equal(median([{ speed: null }, { speed: 5 }, { speed: null }], "speed"), 5);
  assert.equal(median([{ speed: null }], "speed"), null);
  assert.equal(median([], "speed"), null);
});

test("the highest bar is as high as there is room, the others in proportion", () => {
  assert.equal(barsPath([10, 5], 10), "M0.6 76v-70.0h3.8V76zM5.6 76v-35.0h3.8V76z");
});

test("zero has no bar, and anything above it a visible one", () => {
  assert.equal(barsPath([0, 0], 0), "");
  assert.equal(barsPath([0, 1], 10_000), "M5.6 76v-2.0h3.8V76z");
});
