// Reads server-sent events from a fetched response: EventSource can't send the key in a header.

/**
 * A server-sent event. `id` is the last id that the stream named, if any.
 *
 * @typedef {{ id: string | undefined, event: string, data: string }} Frame
 */

/**
 * Iterate over the events of a text/event-stream response. A comment yields null: it is a
 * keep-alive. Leaving the loop cancels the response.
 *
 * https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
 *
 * @param {Response} response
 * @returns {AsyncGenerator<Frame | null, void>}
 */
export async function* serverSentEvents({ body }) {
  if (body === null) return;
  /** @type {string | undefined} */
  let id;
  let event = "";
  /** @type {string[]} */
  let data = [];
  for await (const line of lines(body)) {
    const [, name, text = ""] = /^([^:]*):? ?(.*)$/s.exec(line) ?? [];
    if (line === "") {
      if (data.length) yield { id, event: event || "message", data: data.join("\n") };
      event = "";
      data = [];
    } else if (name === "") yield null;
    else if (name === "id") id = text;
    else if (name === "event") event = text;
    else if (name === "data") data.push(text);
  }
}

/**
 * Iterate over the lines of a body. An incomplete last line is dropped, as the specification
 * requires.
 *
 * @param {ReadableStream<Uint8Array>} body
 */
async function* lines(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      // a CR at the end may be the first half of a CRLF
      const found = (rest + decoder.decode(value, { stream: true })).split(/\r\n|\n|\r(?!$)/);
      rest = found.pop() ?? "";
      yield* found;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
