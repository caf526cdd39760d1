"""How an answer travels: its pace, and the faults that one request asked for."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import gevent

from gateway.simulator.exchange import Exchange, Reset
from gateway.simulator.faults import Knobs
from gateway.simulator.memory import Instance

#: Tokens that get through before a fault interrupts a stream.
_TOKENS_BEFORE_FAULT = 3
_CRASH = "The model has crashed without additional information. (Exit code: 6)"


@dataclass
class Answer:
    """A plain answer; ``tokens`` is how many it took, each costing the pace before the head."""

    status: int
    body: bytes
    content_type: str = "application/json; charset=utf-8"
    headers: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    instance: Instance | None = None


@dataclass
class EventStream:
    """A stream of server-sent events, each of them bytes; only the tokens are paced."""

    opening: list[bytes]
    tokens: Iterable[bytes]
    closing: list[bytes]
    instance: Instance | None = None


def json_answer(content: Any, status: int = 200, **more: Any) -> Answer:
    """Return a plain JSON answer."""
    return Answer(status, json.dumps(content, ensure_ascii=False).encode(), **more)


def error_answer(
    status: int, message: str, param: str | None = None, code: str | None = None,
    kind: str = "invalid_request_error",
) -> Answer:  # fmt: skip
    """Return an error object in OpenAI's form."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json_answer({"error": error}, status)


_REPLACEMENTS = {
    "refuse-500": Answer(
        500, b"<html><body><h1>500 Internal Server Error</h1></body></html>", "text/html"
    ),
    "error-string-500": json_answer({"error": _CRASH}, 500),
    "status-429": error_answer(429, "Too many requests.", None, "rate_limit_exceeded", "requests"),
    "error-200": json_answer({"error": _CRASH}),
    "error-200-object": error_answer(200, _CRASH),
    "error-200-stream": json_answer({"error": _CRASH}),
}
_REPLACEMENTS["status-429"].headers["Retry-After"] = "1"


def deliver(exchange: Exchange, knobs: Knobs, make: Callable[[], Answer | EventStream]) -> None:
    """Make the answer and send it as the knobs want it."""
    gevent.sleep(knobs.prefill)
    if knobs.has("close-before-head"):
        raise Reset
    if knobs.has("garbage-head"):
        exchange.write_raw(b"\x16\x03 this is no HTTP \xff\r\n\r\n")
        exchange.hang_up()
        return
    replacement = next((_REPLACEMENTS[name] for name in knobs.faults & set(_REPLACEMENTS)), None)
    answer = replacement or make()
    with answer.instance.in_use() if answer.instance else nullcontext():
        if isinstance(answer, EventStream):
            _deliver_stream(exchange, knobs, answer)
        else:
            _deliver_plain(exchange, knobs, answer)


def _deliver_plain(exchange: Exchange, knobs: Knobs, answer: Answer) -> None:
    gevent.sleep(answer.tokens * knobs.pace)
    body, headers = answer.body, {"Content-Type": answer.content_type} | answer.headers
    if knobs.has("gzip"):
        body, headers["Content-Encoding"] = gzip.compress(body), "gzip"
    length: int | None = len(body)
    if knobs.has("no-length"):
        length, headers["Connection"] = None, "close"
    if knobs.has("break-plain"):
        length = len(body) + 100
        exchange.hang_up()
    exchange.send_head(answer.status, headers, length)
    if exchange.method != "HEAD":
        gevent.sleep(knobs.head_delay)
        exchange.send(body)
        exchange.finish()


def _deliver_stream(exchange: Exchange, knobs: Knobs, stream: EventStream) -> None:
    headers = {
        "Content-Type": "text/event-stream",
        "Cache-Control": "no-cache",
        "Connection": "keep-alive",
    }
    if knobs.has("gzip"):
        headers["Content-Encoding"] = "gzip"
    exchange.send_head(200, headers, None)
    gevent.sleep(knobs.head_delay)
    for write in _writes(knobs, _interrupted(knobs, stream)):
        exchange.send(write)
    exchange.finish()


def _interrupted(knobs: Knobs, stream: EventStream) -> Iterator[bytes]:
    """Yield the stream's events, paced, until its end or until the fault that was asked for."""
    breaks = knobs.faults & {
        "break-stream", "silent-stream", "error-in-stream-event", "error-in-stream-data"
    }  # fmt: skip
    tokens = islice(stream.tokens, _TOKENS_BEFORE_FAULT) if breaks else iter(stream.tokens)
    hurried = knobs.has("one-chunk") or knobs.has("split-bytes")
    yield from stream.opening
    for token in tokens:
        yield token
        if not hurried:
            gevent.sleep(knobs.pace)
    if not breaks:
        yield from stream.closing
    elif "break-stream" in breaks:
        raise Reset
    elif "silent-stream" in breaks:
        gevent.sleep(86400)
    elif "error-in-stream-event" in breaks:
        yield (
            b"event: error\ndata: " + json.dumps({"error": {"message": _CRASH}}).encode() + b"\n\n"
        )
    else:
        yield b"data: " + json.dumps({"error": _CRASH}).encode() + b"\n\n"


def _writes(knobs: Knobs, events: Iterator[bytes]) -> Iterator[bytes]:
    """Turn events into the byte strings of the single writes."""
    if knobs.has("crlf"):
        events = (event.replace(b"\n", b"\r\n") for event in events)
    if knobs.has("gzip"):
        events = _gzipped(events)
    if knobs.has("one-chunk"):
        events = iter([b"".join(events)])
    if knobs.has("split-bytes"):
        events = (bytes([byte]) for byte in chain.from_iterable(events))
    return events


def _gzipped(events: Iterator[bytes]) -> Iterator[bytes]:
    """Compress event by event, so that each can be read when it arrives."""
    squeeze = zlib.compressobj(wbits=31)
    for event in events:
        yield squeeze.compress(event) + squeeze.flush(zlib.Z_SYNC_FLUSH)
    yield squeeze.flush()
