import assert from "node:assert/strict";
import { test } from "node:test";

import {
  duration,
  fileSize,
  joined,
  modelName,
  number,
  plural,
  timeOfDay,
  wholeUnits,
} from "../../../../gateway/debug/dashboard/scripts/format.mjs";

test("a number has thousands separators and only the requested digits", () => {
  assert.equal(number(32768), "32,768");
  assert.equal(number(12.345), "12");
  assert.equal(number(12.345, 1), "12.3");
  assert.equal(number(12, 1), "12");
});

test("a count has its noun in singular or plural", () => {
  assert.equal(plural(1, "token"), "1 token");
  assert.equal(plural(0, "token"), "0 tokens");
  assert.equal(plural(1234, "token"), "1,234 tokens");
});

test("the longer a duration is, the less precise it is", () => {
  const cases = [
    [0, "0 ms"],
    [999.4, "999 ms"],
    [1000, "1.00 s"],
    [9994, "9.99 s"],
    [10_000, "10.0 s"],
    [59_940, "59.9 s"],
    [60_000, "1 min"],
    [3_725_000, "1 h 2 min"],
  ];
  for (const [ms, text] of cases) assert.equal(duration(ms), text);
});

test("an unknown duration is a dash", () => {
  assert.equal(duration(null), "–");
  assert.equal(duration(undefined), "–");
});

test("whole units are the two largest that are not zero", () => {
  const cases = [
    [0, "0 s"],
    [499, "0 s"],
    [59_600, "1 min"],
    [90_000, "1 min 30 s"],
    [5_400_000, "1 h 30 min"],
    [86_400_000, "1 d"],
    [90_061_000, "1 d 1 h"],
    [86_405_000, "1 d 5 s"],
  ];
  for (const [ms, text] of cases) assert.equal(wholeUnits(ms), text);
});

test("an unknown file size is empty", () => {
  assert.equal(fileSize(4_683_000_000), "4.7 GB");
  assert.equal(fileSize(null), "");
  assert.equal(fileSize(undefined), "");
});

test("a time of day is local and has milliseconds", () => {
  const local = new Date(2026, 0, 2, 3, 4, 5, 6);
  assert.equal(timeOfDay(local.toISOString()), "03:04:05.006");
});

test("empty parts leave no separator behind", () => {
  assert.equal(joined("a", "", null, undefined, 0, "b"), "a · 0 · b");
  assert.equal(joined(), "");
});

test("an instance is named if its name differs from its model's", () => {
  assert.equal(modelName({ modelKey: "qwen", instanceId: "coder" }), "qwen as coder");
  assert.equal(modelName({ modelKey: "qwen", instanceId: "qwen" }), "qwen");
  assert.equal(modelName({ modelKey: "qwen", instanceId: null }), "qwen");
  assert.equal(modelName({ modelKey: "qwen" }), "qwen");
});
