import assert from "node:assert/strict";
import { test } from "node:test";

import {
  describe,
  errorText,
  GROUPS,
  groupOf,
} from "../../../../gateway/debug/dashboard/scripts/describe.mjs";

const START = {
  requestId: "1",
  method: "POST",
  path: "/v1/chat/completions",
  model: "qwen",
  stream: true,
  client: "app",
};
const COMPLETE = {
  requestId: "1",
  status: 200,
  cancelled: false,
  totalTimeMs: 2500,
  ttftMs: 120,
  tokensPerSec: 41.26,
  tokenUsage: { completionTokens: 98 },
};
const MODEL = { modelKey: "qwen", instanceId: "coder" };

const complete = (changes, start) =>
  describe({ type: "inference_complete", data: { ...COMPLETE, ...changes } }, start);

test("a start names the endpoint, the model and the client", () => {
  const line = describe({ type: "inference_start", data: START });
  assert.equal(line, "POST /v1/chat/completions · qwen · stream · app");
  const other = describe({ type: "inference_start", data: { ...START, model: "", stream: false } });
  assert.equal(other, "POST /v1/chat/completions · app");
});

test("a completion has its times, its tokens and the model of its start", () => {
  const line = "200 · 2.50 s · first byte 120 ms · 98 tokens · 41.3 tokens/s";
  assert.equal(complete({}, START), `${line} · qwen`);
  assert.equal(complete({}), line);
});

test("the first byte is left out if it adds nothing", () => {
  const line = "200 · 2.50 s · 98 tokens · 41.3 tokens/s";
  assert.equal(complete({ ttftMs: null }), line);
  assert.equal(complete({}, { ...START, stream: false }), `${line} · qwen`);
});

test("a cancelled request says that its client disconnected", () => {
  const changes = { status: 499, cancelled: true, tokenUsage: null, tokensPerSec: null };
  assert.equal(complete(changes), "499 client disconnected · 2.50 s · first byte 120 ms");
});

test("a model's events name it and what happened to it", () => {
  const took = { totalTimeMs: 1500 };
  const cases = [
    ["model_load_start", { loadConfig: { seed: 1 } }, 'qwen as coder · {"seed":1}'],
    ["model_load_progress", { progress: 42.5 }, "qwen as coder · 42.5 %"],
    ["model_load_complete", { ...took, activated: true }, "qwen as coder · 1.50 s · activated"],
    ["model_load_complete", { ...took, activated: false }, "qwen as coder · 1.50 s"],
    ["model_unload_start", {}, "qwen as coder"],
    ["model_unload_complete", { totalTimeMs: 30 }, "qwen as coder · 30 ms"],
    ["model_activate", { defaultInference: { topK: 5 } }, 'qwen as coder · {"topK":5}'],
    ["model_deactivate", {}, "qwen as coder"],
  ];
  for (const [type, data, line] of cases) {
    assert.equal(describe({ type, data: { ...MODEL, ...data } }), line);
  }
});

test("errors and gaps are described", () => {
  const error = { operation: "model_load", error: "Out of memory.", totalTimeMs: 1200 };
  const line = "model_load · Out of memory. · after 1.20 s";
  assert.equal(describe({ type: "error", data: error }), line);
  assert.equal(describe({ type: "gap", data: { missed: 1 } }), "1 event missed");
});

test("a change of LM Studio's state has its reason", () => {
  const down = { host: "default", state: "down", reason: "It can't be reached." };
  const line = "LM Studio (default) is down · It can't be reached.";
  assert.equal(describe({ type: "host_state", data: down }), line);
  const up = { host: "default", state: "up" };
  assert.equal(describe({ type: "host_state", data: up }), "LM Studio (default) is up");
});

test("an event of an unknown type is shown as it is", () => {
  assert.equal(describe({ type: "key_created", data: { name: "app" } }), '{"name":"app"}');
  assert.equal(groupOf("key_created"), "");
});

test("every type belongs to the group that lists it", () => {
  for (const [group, types] of Object.entries(GROUPS)) {
    for (const type of types) assert.equal(groupOf(type), group);
  }
});

test("errors of both dialects become text", () => {
  assert.equal(errorText({ error: "Not found" }), "Not found");
  assert.equal(errorText({ error: { message: "Not found" } }), "Not found");
  assert.equal(errorText({}), "");
});

test("an error's details name their fields", () => {
  const details = [
    { path: ["loadConfig", "gpu", 0], message: "Too much." },
    { path: [], message: "Give one." },
  ];
  const text = errorText({ error: "Validation failed", details });
  assert.equal(text, "Validation failed: loadConfig.gpu.0: Too much.; Give one.");
});
