import assert from "node:assert/strict";
import { test } from "node:test";

import { serverSentEvents } from "../../../../gateway/debug/dashboard/scripts/sse.mjs";

/** The events of a stream that arrives in these pieces. */
async function read(...pieces) {
  const found = [];
  for await (const frame of serverSentEvents(answer(pieces))) found.push(frame);
  return found;
}

function answer(pieces, onCancel = () => {}) {
  const encoder = new TextEncoder();
  const bytes = pieces.map((piece) => (typeof piece === "string" ? encoder.encode(piece) : piece));
  const body = new ReadableStream({
    pull(controller) {
      if (bytes.length) controller.enqueue(bytes.shift());
      else controller.close();
    },
    cancel: onCancel,
  });
  return new Response(body);
}

test("an event has its id, its type and its data", async () => {
  const found = await read("id: 7\nevent: gap\ndata: {}\n\n");
  assert.deepEqual(found, [{ id: "7", event: "gap", data: "{}" }]);
});

test("an event without a type is a message, and keeps the last id", async () => {
  const found = await read("id: 7\nevent: gap\ndata: a\n\ndata: b\n\n");
  assert.deepEqual(found[1], { id: "7", event: "message", data: "b" });
});

test("lines of data are joined, and only one space before them is dropped", async () => {
  const [frame] = await read("data:a\ndata:  b: c\ndata\n\n");
  assert.equal(frame.data, "a\n b: c\n");
});

test("an event without data is ignored", async () => {
  assert.deepEqual(await read("event: gap\nid: 1\n\nretry: 3000\n\n"), []);
});

test("a comment yields null, as a keep-alive", async () => {
  assert.deepEqual(await read(": keep-alive\n\n"), [null]);
});

test("an incomplete event at the end is dropped", async () => {
  const complete = { id: undefined, event: "message", data: "a" };
  assert.deepEqual(await read("data: a\n\ndata: b\n"), [complete]);
  assert.deepEqual(await read("data: b"), []);
});

test("a response without a body has no events", async () => {
  const found = [];
  for await (const frame of serverSentEvents(new Response(null))) found.push(frame);
  assert.deepEqual(found, []);
});

test("it does not matter where the stream is split, or how its lines end", async () => {
  for (const end of ["\n", "\r\n", "\r"]) {
    const event = ["id: 1", "event: x", "data: é€😀", "data: z", ""];
    const text = [": hi", ...event, "data: last", "", "."].join(end);
    const bytes = new TextEncoder().encode(text);
    const expected = [
      null,
      { id: "1", event: "x", data: "é€😀\nz" },
      { id: "1", event: "message", data: "last" },
    ];
    for (let cut = 0; cut <= bytes.length; cut += 1) {
      const pieces = [bytes.slice(0, cut), bytes.slice(cut)].filter((piece) => piece.length);
      assert.deepEqual(await read(...pieces), expected, `cut at ${cut} of ${JSON.stringify(text)}`);
    }
    const single = [...bytes].map((byte) => Uint8Array.of(byte));
    assert.deepEqual(await read(...single), expected, `byte by byte, ${JSON.stringify(end)}`);
  }
});

test("a reader that stops cancels the stream", async () => {
  const cancelled = new Promise((resolve) => {
    (async () => {
      const endless = answer(Array(1000).fill("data: a\n\n"), () => resolve(true));
      for await (const frame of serverSentEvents(endless)) if (frame) break;
    })();
  });
  assert.equal(await cancelled, true);
});
