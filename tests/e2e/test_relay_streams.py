"""Streams: every byte as LM Studio sent it, at once, and visibly broken when they broke."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.processes import Gateway, Simulator

pytestmark = pytest.mark.both_servers

MODEL = "qwen2-1.5b-instruct"
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
COMMENT = b": keep-alive\n\n"
END = b"\r\n0\r\n\r\n"
PATIENCE = 60
Raw = Callable[..., bytes]


def request(path: str, simulate: dict[str, str], count: int = 5, **more: Any) -> bytes:
    """A stream's request, whose answer ends with the connection."""
    content = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"count to {count}"}],
        "stream": True,
        **more,
    }
    body = json.dumps(content).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: gateway", "Connection: close"]
    lines += [f"Content-Length: {len(body)}"]
    lines += [f"X-Simulator-{name}: {value}" for name, value in simulate.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def connect(gateway: Gateway, data: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", gateway.port), PATIENCE)
    client.sendall(data)
    return client


def raw(gateway: Gateway, data: bytes) -> bytes:
    """Everything that came until the connection closed."""
    with connect(gateway, data) as client:
        received = b""
        while piece := client.recv(65536):
            received += piece
    return received


def payload(answer: bytes) -> bytes:
    """The chunks of a raw answer, joined, complete or not."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert b"chunked" in head, answer
    joined = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        joined += rest[:length]
        rest = rest[length + 2 :]
    return joined


def without_usage(sent: bytes) -> bytes:
    """The stream without its single usage chunk, whatever its line ends."""
    parts = re.split(rb"(?<=\n\n)|(?<=\r\n\r\n)", sent)
    kept = [part for part in parts if b'"choices":[]' not in part]
    assert len(parts) - len(kept) == 1
    return b"".join(kept)


def numbers(stream: bytes) -> list[int]:
    """The numbers that a stream counted, in the order of their arrival."""
    return [int(number) for number in re.findall(rb'"(?:content|text)":"(\d+) "', stream)]


FAULTS = ["split-bytes", "crlf", "one-chunk", "split-bytes,crlf", "one-chunk,crlf"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("asked", [False, True], ids=["not-asked", "usage-asked"])
def test_a_chat_is_the_same_bytes_however_they_come(
    gateway: Gateway, simulator: Simulator, fault: str, asked: bool
) -> None:
    more = {"stream_options": {"include_usage": True}} if asked else {}
    answer = raw(gateway, request(CHAT, {"Fault": fault}, **more))
    sent = simulator.last_request()["sent"]
    assert payload(answer) == (sent if asked else without_usage(sent))
    assert numbers(payload(answer)) == [1, 2, 3, 4, 5]
    assert answer.endswith(END)


@pytest.mark.parametrize("fault", [*FAULTS, "gzip"])
def test_messages_are_the_same_bytes_however_they_come(
    gateway: Gateway, simulator: Simulator, fault: str
) -> None:
    answer = raw(gateway, request(MESSAGES, {"Fault": fault}, max_tokens=99))
    assert payload(answer) == simulator.last_request()["sent"]
    assert answer.endswith(END)


@pytest.mark.parametrize("options", [{"include_usage": False}, {"other": 1}, {}, None])
def test_usage_is_taken_out_unless_it_was_asked_for(
    gateway: Gateway, simulator: Simulator, options: Any
) -> None:
    answer = raw(gateway, request(CHAT, {}, stream_options=options))
    record = simulator.last_request()
    asked = {**(options or {}), "include_usage": True}
    assert json.loads(record["body"])["stream_options"] == asked
    assert payload(answer) == without_usage(record["sent"])
    assert dict(record["headers"])["Accept-Encoding"] == "identity"


def test_the_head_goes_out_before_the_first_byte(gateway: Gateway) -> None:
    delay = 2.0
    began = time.monotonic()
    with connect(gateway, request(CHAT, {"Head-Delay-Ms": str(int(delay * 1000))})) as client:
        answer = http.client.HTTPResponse(client)
        answer.begin()
        head_came = time.monotonic() - began
        body = answer.read()
    assert head_came < delay / 2
    assert time.monotonic() - began >= delay
    assert answer.getheader("Content-Type", "").startswith("text/event-stream")
    assert answer.getheader("X-Accel-Buffering") == "no"
    assert answer.getheader("Cache-Control") == "no-cache"
    assert answer.headers.get_all("Cache-Control") == ["no-cache"]
    assert body.endswith(b"data: [DONE]\n\n")


def test_a_token_goes_out_when_it_comes(gateway: Gateway) -> None:
    """Each token is there long before the next one is made."""
    with connect(gateway, request(CHAT, {"Pace-Ms": "60000"})) as client:
        received = b""
        while b'"content":"1 "' not in received or not received.endswith(b"\n\n\r\n"):
            piece = client.recv(65536)
            assert piece
            received += piece
    assert numbers(payload(received)) == [1]


def assert_cut(answer: bytes, numbered: int) -> dict[str, Any]:
    """The stream ends with an error event and without its proper end; returns the event's data."""
    assert not answer.endswith(b"0\r\n\r\n")
    body = payload(answer)
    assert b"[DONE]" not in body
    assert b"message_stop" not in body
    assert numbers(body) == list(range(1, numbered + 1))
    last = body.rstrip(b"\n").rpartition(b"\n\n")[2]
    assert body.endswith(b"\n\n")
    parsed: dict[str, Any] = json.loads(last.rpartition(b"data: ")[2])
    if b"/v1/messages" in answer or b"event: message_start" in body:
        assert last.startswith(b"event: error\ndata: ")
        assert parsed["type"] == "error"
        assert set(parsed["error"]) == {"type", "message"}
    else:
        assert last.startswith(b'data: {"error":')
        assert set(parsed["error"]) == {"message", "type", "param", "code"}
    return parsed


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_broken_stream_looks_broken(gateway: Gateway, path: str) -> None:
    more = {"max_tokens": 99} if path == MESSAGES else {}
    answer = raw(gateway, request(path, {"Fault": "break-stream"}, **more))
    error = assert_cut(answer, 3)["error"]
    assert error.get("code", "bad_gateway") == "bad_gateway"
    assert "LM Studio broke off the stream" in error["message"]


@pytest.fixture(scope="module")
def impatient(
    server: str, shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway with short timeouts."""
    gateway = Gateway(
        tmp_path_factory.mktemp("impatient"),
        shared_simulator.url,
        server,
        PROXY_TIMEOUT=1000,
        PROXY_STREAM_TIMEOUT=1000,
        WEB_CONCURRENCY=1,
    )
    yield gateway
    gateway.stop()


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_silence_beyond_the_stream_timeout_ends_a_stream(
    impatient: Gateway, simulator: Simulator, path: str
) -> None:
    more = {"max_tokens": 99} if path == MESSAGES else {}
    error = assert_cut(raw(impatient, request(path, {"Fault": "silent-stream"}, **more)), 3)
    assert error["error"].get("code", "upstream_timeout") == "upstream_timeout"
    assert "PROXY_STREAM_TIMEOUT" in error["error"]["message"]


def test_silence_before_the_head_beyond_the_stream_timeout_is_a_504(
    impatient: Gateway, simulator: Simulator
) -> None:
    answer = raw(impatient, request(CHAT, {"Prefill-Ms": "60000"}))
    assert answer.startswith(b"HTTP/1.1 504 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "upstream_timeout"


def test_a_stream_may_take_longer_than_the_timeouts(
    impatient: Gateway, simulator: Simulator
) -> None:
    answer = raw(impatient, request(CHAT, {"Pace-Ms": "150"}, 10))
    assert numbers(payload(answer)) == list(range(1, 11))
    assert answer.endswith(END)
