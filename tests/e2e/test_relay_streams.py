"""Streams pass unchanged and at once, and a client notices when one breaks off."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.processes import Gateway, Simulator
from tests.raw_http import counted, exchange, request, unchunked

pytestmark = pytest.mark.both_servers

MODEL = "qwen2-1.5b-instruct"
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
COMMENT = b": keep-alive\n\n"
END = b"\r\n0\r\n\r\n"
TIMEOUT = 60


def stream(path: str, simulate: dict[str, str], count: int = 5, **more: Any) -> bytes:
    """A request for a stream."""
    messages = [{"role": "user", "content": f"count to {count}"}]
    content = {"model": MODEL, "messages": messages, "stream": True, **more}
    return request("POST", path, content, simulate)


def connect(gateway: Gateway, data: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", gateway.port), TIMEOUT)
    client.sendall(data)
    return client


def without_usage(sent: bytes) -> bytes:
    """The stream without its usage chunk, of which there is exactly one."""
    parts = re.split(rb"(?<=\n\n)|(?<=\r\n\r\n)", sent)
    kept = [part for part in parts if b'"choices":[]' not in part]
    assert len(parts) - len(kept) == 1
    return b"".join(kept)


FAULTS = ["split-bytes", "crlf", "one-chunk", "split-bytes,crlf", "one-chunk,crlf"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("requested", [False, True], ids=["no-usage", "usage"])
def test_a_chat_stream_is_unchanged_however_it_arrives(
    gateway: Gateway, simulator: Simulator, fault: str, requested: bool
) -> None:
    more = {"stream_options": {"include_usage": True}} if requested else {}
    response = exchange(gateway.port, stream(CHAT, {"Fault": fault}, **more))
    sent = simulator.last_request()["sent"]
    assert unchunked(response) == (sent if requested else without_usage(sent))
    assert counted(response) == [1, 2, 3, 4, 5]
    assert response.endswith(END)


@pytest.mark.parametrize("fault", [*FAULTS, "gzip"])
def test_a_messages_stream_is_unchanged_however_it_arrives(
    gateway: Gateway, simulator: Simulator, fault: str
) -> None:
    response = exchange(gateway.port, stream(MESSAGES, {"Fault": fault}, max_tokens=99))
    assert unchunked(response) == simulator.last_request()["sent"]
    assert response.endswith(END)


@pytest.mark.parametrize("options", [{"include_usage": False}, {"other": 1}, {}, None])
def test_usage_is_removed_unless_the_client_requested_it(
    gateway: Gateway, simulator: Simulator, options: Any
) -> None:
    response = exchange(gateway.port, stream(CHAT, {}, stream_options=options))
    record = simulator.last_request()
    requested = {**(options or {}), "include_usage": True}
    assert json.loads(record["body"])["stream_options"] == requested
    assert unchunked(response) == without_usage(record["sent"])
    assert dict(record["headers"])["Accept-Encoding"] == "identity"


def test_the_head_is_sent_before_the_first_byte(gateway: Gateway, simulator: Simulator) -> None:
    """LM Studio sends its head at once and the first byte a minute later."""
    with connect(gateway, stream(CHAT, {"Head-Delay-Ms": "60000"})) as client:
        # after 10 s the gateway would send a head of its own, with a comment
        client.settimeout(9)
        with closing(http.client.HTTPResponse(client)) as response:
            response.begin()
            assert simulator.last_request()["sent"] == b""
    assert response.getheader("Content-Type", "").startswith("text/event-stream")
    assert response.getheader("X-Accel-Buffering") == "no"
    assert response.headers.get_all("Cache-Control") == ["no-cache"]


def test_a_token_is_sent_when_it_arrives(gateway: Gateway) -> None:
    """The first token arrives long before LM Studio sends the second."""
    with connect(gateway, stream(CHAT, {"Pace-Ms": "60000"})) as client:
        received = b""
        while b'"content":"1 "' not in received or not received.endswith(b"\n\n\r\n"):
            piece = client.recv(65536)
            assert piece
            received += piece
    assert counted(received) == [1]


def assert_broken_off(response: bytes, numbered: int) -> dict[str, Any]:
    """The stream ends with an error event but without a proper end; returns the event's data."""
    assert not response.endswith(b"0\r\n\r\n")
    body = unchunked(response)
    assert b"[DONE]" not in body
    assert b"message_stop" not in body
    assert counted(response) == list(range(1, numbered + 1))
    last = body.rstrip(b"\n").rpartition(b"\n\n")[2]
    assert body.endswith(b"\n\n")
    parsed: dict[str, Any] = json.loads(last.rpartition(b"data: ")[2])
    if b"/v1/messages" in response or b"event: message_start" in body:
        assert last.startswith(b"event: error\ndata: ")
        assert parsed["type"] == "error"
        assert set(parsed["error"]) == {"type", "message"}
    else:
        assert last.startswith(b'data: {"error":')
        assert set(parsed["error"]) == {"message", "type", "param", "code"}
    return parsed


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_clients_notice_that_a_stream_broke_off(gateway: Gateway, path: str) -> None:
    more = {"max_tokens": 99} if path == MESSAGES else {}
    response = exchange(gateway.port, stream(path, {"Fault": "break-stream"}, **more))
    error = assert_broken_off(response, 3)["error"]
    assert error.get("code", "bad_gateway") == "bad_gateway"
    assert "LM Studio broke off the stream" in error["message"]


@pytest.fixture(scope="module")
def short_timeouts(
    server: str, shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway with timeouts of 2 s."""
    gateway = Gateway(
        tmp_path_factory.mktemp("short_timeouts"),
        shared_simulator.url,
        server,
        PROXY_TIMEOUT=2000,
        PROXY_STREAM_TIMEOUT=2000,
        WEB_CONCURRENCY=1,
    )
    yield gateway
    gateway.stop()


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_silence_beyond_the_stream_timeout_ends_a_stream(
    short_timeouts: Gateway, simulator: Simulator, path: str
) -> None:
    more = {"max_tokens": 99} if path == MESSAGES else {}
    error = assert_broken_off(
        exchange(short_timeouts.port, stream(path, {"Fault": "silent-stream"}, **more)), 3
    )
    assert error["error"].get("code", "upstream_timeout") == "upstream_timeout"
    assert "PROXY_STREAM_TIMEOUT" in error["error"]["message"]


def test_silence_before_the_head_beyond_the_stream_timeout_is_a_504(
    short_timeouts: Gateway, simulator: Simulator
) -> None:
    response = exchange(short_timeouts.port, stream(CHAT, {"Prefill-Ms": "60000"}))
    assert response.startswith(b"HTTP/1.1 504 ")
    assert json.loads(response.partition(b"\r\n\r\n")[2])["error"]["code"] == "upstream_timeout"


def test_a_stream_may_take_longer_than_the_timeouts(
    short_timeouts: Gateway, simulator: Simulator
) -> None:
    response = exchange(short_timeouts.port, stream(CHAT, {"Pace-Ms": "250"}, 10))
    assert counted(response) == list(range(1, 11))
    assert response.endswith(END)
