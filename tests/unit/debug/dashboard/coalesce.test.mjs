import assert from "node:assert/strict";
import { test } from "node:test";

import { coalesced } from "../../../../gateway/debug/dashboard/scripts/coalesce.mjs";

const GAP = 500;

/** A clock that moves by hand, and work that takes as long as the test wants. */
function stage(context) {
  let now = 10_000;
  let timers = [];
  let end = null;
  const starts = [];
  context.mock.method(globalThis, "setTimeout", (run, delay) => {
    timers.push({ at: now + delay, run });
  });
  context.mock.method(performance, "now", () => now);
  return {
    /** When the work has started, in milliseconds. */
    starts,
    soon: coalesced(() => {
      assert.equal(end, null, "it is still running");
      starts.push(now - 10_000);
      return new Promise((resolve) => { end = resolve; });
    }, GAP),
    advance(ms) {
      now += ms;
      const due = timers.filter(({ at }) => at <= now);
      timers = timers.filter(({ at }) => at > now);
      for (const { run } of due) run();
    },
    async finish() {
      end();
      end = null;
      // lets everything that awaits the work run
      await new Promise((resolve) => { setImmediate(resolve); });
    },
  };
}

test("the first call starts the work at once, and further calls change nothing", async (t) => {
  const { soon, starts, advance, finish } = stage(t);
  for (let times = 0; times < 5; times += 1) soon();
  assert.deepEqual(starts, []);
  advance(0);
  await finish();
  advance(10 * GAP);
  assert.deepEqual(starts, [0]);
});

test("calls while the work runs make it run once more, after the gap", async (t) => {
  const { soon, starts, advance, finish } = stage(t);
  soon();
  advance(0);
  for (let times = 0; times < 5; times += 1) soon();
  advance(100);
  await finish();
  advance(GAP - 1);
  assert.deepEqual(starts, [0]);
  advance(1);
  assert.deepEqual(starts, [0, 100 + GAP]);
  await finish();
  advance(10 * GAP);
  assert.equal(starts.length, 2);
});

test("a call within the gap waits for the end of the gap", async (t) => {
  const { soon, starts, advance, finish } = stage(t);
  soon();
  advance(0);
  await finish();
  advance(GAP - 200);
  soon();
  advance(199);
  assert.deepEqual(starts, [0]);
  advance(1);
  assert.deepEqual(starts, [0, GAP]);
});

test("a call after the gap starts the work at once", async (t) => {
  const { soon, starts, advance, finish } = stage(t);
  soon();
  advance(0);
  await finish();
  advance(3 * GAP);
  soon();
  advance(0);
  assert.deepEqual(starts, [0, 3 * GAP]);
});
