// Sends requests to the gateway.

import { errorText } from "./describe.mjs";
import { currentKey, HERE, sessionSignal } from "./session.mjs";

/** A failed request. `message` is for the user; `status` is 0 if there was no response. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {number} status
   * @param {number} retryAfter seconds to wait before another attempt
   */
  constructor(message, status = 0, retryAfter = 0) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }

  /**
   * The error in a response: from the gateway itself, or from a proxy in front of it.
   *
   * @param {Response} response
   */
  static async from(response) {
    const body = await response.text().catch(() => "");
    let text = "";
    try {
      text = errorText(JSON.parse(body));
    } catch {
      // not JSON: a proxy between the browser and the gateway sent it
    }
    const { status, statusText } = response;
    const retryAfter = Number(response.headers.get("Retry-After")) || 0;
    text ||= `The server responded with ${status} ${statusText}.`;
    return new ApiError(text, status, retryAfter);
  }
}

/**
 * Send a request; with a `body` it is a POST. Throws ApiError, or AbortError once `signal` is
 * aborted.
 *
 * @param {string} path relative to the dashboard
 * @param {{ body?: object, headers?: Record<string, string>, signal?: AbortSignal }} [options]
 */
export async function call(path, { body, headers = {}, signal = sessionSignal() } = {}) {
  /** @type {Record<string, string>} */
  const sent = { ...headers };
  const key = currentKey();
  // X-API-Key leaves Authorization to a proxy that asks for a password of its own
  if (key) sent["X-API-Key"] = key;
  /** @type {RequestInit} */
  const options = { cache: "no-store", signal, headers: sent };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    sent["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(new URL(path, HERE), options);
  } catch (fault) {
    if (signal.aborted) throw fault;
    throw new ApiError("The gateway can't be reached.");
  }
  if (!response.ok) throw await ApiError.from(response);
  return response;
}

/**
 * GET a JSON document. Its type is what the caller expects; nothing checks it.
 *
 * @param {string} path
 * @returns {Promise<any>}
 */
export async function readJson(path) {
  return (await call(path)).json();
}

/**
 * The message to show for anything that was thrown.
 *
 * @param {unknown} fault
 */
export function messageOf(fault) {
  return fault instanceof Error ? fault.message : String(fault);
}
