"""Responses whose head comes late, or that are compressed, over a real exchange."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import zlib
from typing import Any

import pytest

from gateway.observe import Record
from gateway.proxy import relay
from gateway.proxy.repair import MAX_ERROR_BYTES, decode
from gateway.proxy.usage import Tap
from tests.lm_studio import read_head, served

EVENTS = b'data: {"choices":[{"delta":{"content":"1 "}}]}\n\ndata: [DONE]\n\n'
KEEP_ALIVE = b": keep-alive\n\n"
JSON, STREAM = b"Content-Type: application/json\r\n", b"Content-Type: text/event-stream\r\n"
GZIP = b"Content-Encoding: gzip\r\n"


def head(status: int, headers: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\n%bContent-Length: %d\r\n\r\n%b" % (status, headers, len(body), body)


def late(response: bytes, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, bool, Record]:
    """What a client gets whose stream began before the response, whether it was cut, and the
    exchange's record."""
    monkeypatch.setattr(relay, "HEARTBEAT", 0.05)
    record = Record("id", "", "POST", "/v1/chat/completions", stream=True)
    began = threading.Event()

    def script(connection: socket.socket) -> None:
        read_head(connection)
        began.wait(10)
        connection.sendall(response)

    with served(script) as server:
        exchange = server.exchange("POST", b"{}")
        exchange.send()
        pieces = relay.late_stream(exchange, Tap(remove_usage=True), 5.0, record, "openai")
        received, cut = [next(pieces)], False
        began.set()
        try:
            received += pieces
        except relay.ResponseAborted:
            cut = True
        exchange.close()
    body = b"".join(received)
    assert body.startswith(KEEP_ALIVE)
    return body.replace(KEEP_ALIVE, b""), cut, record


def error_of(body: bytes) -> dict[str, Any]:
    """The error of the error event that is all of a body."""
    assert body.startswith(b"data: ")
    assert body.endswith(b"\n\n")
    return dict(json.loads(body[6:])["error"])


def test_a_late_response_of_any_size_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.dumps({"id": "x", "text": ["word"] * 50_000}, indent=1).encode()
    assert len(content) > 4 * MAX_ERROR_BYTES
    body, cut, record = late(head(200, JSON, content), monkeypatch)
    lines = [line.removeprefix(b"data: ") for line in body.removesuffix(b"\n\n").split(b"\n")]
    assert (b"\n".join(lines), cut, record.failed) == (content, False, False)


def test_a_late_response_that_breaks_off_ends_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    response = head(200, JSON, b'{"id": "' + b"x" * 3 * MAX_ERROR_BYTES)[:-100]
    body, cut, record = late(response, monkeypatch)
    event, separator, error = body.partition(b"\n\n")
    assert (event.startswith(b'data: {"id": "xxx'), separator, cut) == (True, b"\n\n", True)
    assert "broke off" in error_of(error)["message"]
    assert record.failed


def test_a_late_error_of_any_size_is_the_error_event(monkeypatch: pytest.MonkeyPatch) -> None:
    page = b"<p>Crashed.</p>" + b"<br>" * MAX_ERROR_BYTES
    body, _, record = late(head(500, JSON, page), monkeypatch)
    assert error_of(body)["message"].startswith("Crashed.")
    assert record.failed


@pytest.mark.parametrize(
    ("status", "headers", "content", "expected"),
    [
        (200, STREAM, EVENTS, EVENTS),
        (200, JSON, b'{"id":\r\n1}', b'data: {"id":\ndata: 1}\n\n'),
    ],
    ids=["stream", "plain"],
)
def test_a_late_compressed_response_is_decoded(
    status: int, headers: bytes, content: bytes, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, cut, record = late(head(status, headers + GZIP, gzip.compress(content)), monkeypatch)
    assert (body, cut, record.failed) == (expected, False, False)


def test_a_late_compressed_error_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = gzip.compress(b'{"error": "The model has crashed."}')
    body, _, record = late(head(500, JSON + GZIP, content), monkeypatch)
    assert error_of(body)["message"] == "The model has crashed."
    # operators get the words that are known, and the status
    assert (
        record.error == "LM Studio responded with an error (500 upstream_error): model has crashed"
    )


@pytest.mark.parametrize(
    "response",
    [
        head(200, JSON + GZIP, gzip.compress(b"x" * 2 * MAX_ERROR_BYTES)),
        head(200, STREAM + GZIP, gzip.compress(EVENTS * 5000)),
        head(500, JSON + GZIP, gzip.compress(b"x" * 100)[:-5]),
        head(500, JSON + b"Content-Encoding: br\r\n", b"\x0b\x02\x80secret\x03"),
        head(200, JSON + GZIP, gzip.compress(b"x" * 100))[:-5],
    ],
    ids=["large", "long stream", "incomplete", "unknown coding", "broken off"],
)
def test_any_other_late_compressed_response_is_an_error(
    response: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, cut, record = late(response, monkeypatch)
    message = error_of(body.lstrip(b"\n"))["message"]
    assert cut
    assert record.error == message
    assert message.isascii()
    assert "secret" not in message


@pytest.mark.parametrize("ends", [True, False])
def test_nothing_stands_in_a_compressed_stream(ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "HEARTBEAT", 0.05)
    record = Record("id", "", "POST", "/v1/chat/completions", stream=True)
    compressed = gzip.compress(EVENTS)
    silence = threading.Event()

    def script(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + STREAM + GZIP)
        connection.sendall(b"Content-Length: %d\r\n\r\n" % len(compressed) + compressed[:20])
        silence.wait(0.5)
        if ends:
            connection.sendall(compressed[20:])

    with served(script) as server:
        exchange = server.exchange("POST", b"{}")
        exchange.send()
        exchange.wait_head(5)
        received, cut = b"", False
        try:
            for piece in relay.coded_stream(exchange, None, record):
                received += piece
        except relay.ResponseAborted:
            cut = True
        exchange.close()
    assert received == (compressed if ends else compressed[:20])
    assert (cut, record.failed) == (not ends, not ends)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_decoding_stops_at_the_limit(coding: str) -> None:
    bomb = b"x" * (50 << 20)
    content = gzip.compress(bomb) if coding == "gzip" else zlib.compress(bomb)
    assert decode(content, coding) == b"x" * (MAX_ERROR_BYTES + 1)
