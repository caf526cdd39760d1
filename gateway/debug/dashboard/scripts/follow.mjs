// Follows the gateway's event stream, and reconnects when it is lost.

import { ApiError, call, messageOf } from "./api.mjs";
import { setClock } from "./charts.mjs";
import { showConnection } from "./connection.mjs";
import { byId, show, write } from "./elements.mjs";
import { askForKey, showRestricted, showView } from "./entrance.mjs";
import { receive } from "./events.mjs";
import { healthSoon, hideHealth } from "./health.mjs";
import { modelsSoon } from "./models.mjs";
import { statusSoon } from "./requests.mjs";
import { currentKey, onSignOut, sessionSignal } from "./session.mjs";
import { serverSentEvents } from "./sse.mjs";

/** @import { GatewayEvent } from "./shapes" */

/** How many past events a newly opened page requests. */
const BACKLOG = 1000;
/** The gateway sends at least a comment every 15 s. */
const SILENCE_MS = 40_000;
const MAX_BACKOFF_S = 15;

/** @type {string | null} The id of the latest event, at which a new connection resumes. */
let lastId = null;
/** The backlog starts at a guessed id, so a gap at its start is expected. */
let fillingBacklog = false;
/** Ends the wait before the next attempt. */
let wakeUp = () => {};

onSignOut(() => { lastId = null; });

/** Reconnect now, if the dashboard is waiting for its next attempt. */
export function retryNow() {
  wakeUp();
}

/** Stay connected until the session ends. */
export async function follow() {
  const signal = sessionSignal();
  let attempt = 0;
  showConnection("warn", "Connecting");
  while (!signal.aborted) {
    let problem = new ApiError("The gateway closed the stream.");
    try {
      const again = await readStream(signal, () => {
        attempt = 0;
        showLive();
      });
      if (again) continue;
    } catch (fault) {
      if (signal.aborted) return;
      problem = fault instanceof ApiError ? fault : new ApiError(messageOf(fault));
      if (problem.status === 401) {
        askForKey(currentKey() ? "This key is not accepted." : "");
        return;
      }
      if (problem.status === 403) {
        await showRestricted(problem);
        return;
      }
    }
    if (signal.aborted) return;
    const backoff = Math.min(MAX_BACKOFF_S, 2 ** attempt) * (0.6 + 0.4 * Math.random());
    attempt += 1;
    await waitToRetry(problem.message, Math.max(problem.retryAfter, backoff), signal);
  }
}

function showLive() {
  showView("dashboard");
  showConnection("good", "Live");
  show(byId("trouble"), false);
  modelsSoon();
  statusSoon();
  healthSoon();
}

/**
 * Read the stream until it ends. Returns true if the caller should read it again at once, from an
 * earlier event.
 *
 * @param {AbortSignal} session
 * @param {() => void} connected called on the `connected` event
 */
async function readStream(session, connected) {
  const controller = new AbortController();
  const stop = () => controller.abort();
  session.addEventListener("abort", stop);
  const silence = watchForSilence(stop);
  try {
    /** @type {Record<string, string>} */
    const headers = { Accept: "text/event-stream" };
    if (lastId !== null) headers["Last-Event-ID"] = lastId;
    const response = await call("stream", { headers, signal: controller.signal });
    for await (const frame of serverSentEvents(response)) {
      silence.reset();
      if (frame === null) continue;
      const { id = "", event: type } = frame;
      const data = JSON.parse(frame.data);
      if (type === "connected") {
        setClock(data.timestamp);
        if (lastId === null && Number(id) > 0) {
          lastId = String(Math.max(0, Number(id) - BACKLOG));
          fillingBacklog = true;
          return true;
        }
        connected();
      } else if (!(fillingBacklog && type === "gap")) {
        fillingBacklog = false;
        receive(id, /** @type {GatewayEvent} */ ({ type, data }));
      }
      if (id) lastId = id;
    }
    return false;
  } catch (fault) {
    if (silence.timedOut()) throw new ApiError("The gateway has stopped responding.");
    if (session.aborted || fault instanceof ApiError) throw fault;
    throw new ApiError("The connection was lost.");
  } finally {
    silence.end();
    session.removeEventListener("abort", stop);
    stop();
  }
}

/**
 * Call `stop` if nothing has arrived for too long: a connection can be lost without either side
 * noticing.
 *
 * @param {() => void} stop
 */
function watchForSilence(stop) {
  let timedOut = false;
  const expire = () => {
    timedOut = true;
    stop();
  };
  let timer = setTimeout(expire, SILENCE_MS);
  return {
    reset() {
      clearTimeout(timer);
      timer = setTimeout(expire, SILENCE_MS);
    },
    timedOut: () => timedOut,
    end: () => clearTimeout(timer),
  };
}

/**
 * Show why the dashboard is not connected, and wait for `seconds`, a call of `retryNow` or the end
 * of the session.
 *
 * @param {string} why
 * @param {number} seconds
 * @param {AbortSignal} session
 */
async function waitToRetry(why, seconds, session) {
  const countdown = byId("trouble-when");
  showConnection("bad", "Not connected");
  hideHealth();
  show(byId("trouble"), true);
  write(byId("trouble-why"), why);
  const until = performance.now() + seconds * 1000;
  await new Promise((/** @type {(value: void) => void} */ resolve) => {
    const timer = setInterval(tick, 250);
    function tick() {
      const left = Math.ceil((until - performance.now()) / 1000);
      write(countdown, `Retrying in ${left} s.`);
      if (left <= 0) wakeUp();
    }
    wakeUp = () => {
      clearInterval(timer);
      session.removeEventListener("abort", wakeUp);
      resolve();
    };
    session.addEventListener("abort", wakeUp);
    tick();
  });
  write(countdown, "Retrying …");
}
