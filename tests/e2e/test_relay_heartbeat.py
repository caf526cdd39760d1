"""Long silences get comments between events, and responses that begin before LM Studio's.

Each case takes longer than ten seconds, so all of them run at the same time, before the first test.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest

from tests.processes import Gateway, Simulator

pytestmark = pytest.mark.both_servers

MODEL = "qwen2-1.5b-instruct"
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
COMMENT = b": keep-alive\n\n"
#: Seconds of silence after which a stream gets a comment.
LONG = 10.0
LATE = {"Prefill-Ms": "13000"}

CASES: dict[str, tuple[str, dict[str, str]]] = {
    "silence": (CHAT, {"Fault": "silent-stream"}),
    "silence-crlf": (CHAT, {"Fault": "silent-stream,crlf"}),
    "silence-gzip": (MESSAGES, {"Fault": "silent-stream,gzip"}),
    "late": (CHAT, LATE),
    "late-messages": (MESSAGES, LATE),
    "late-500": (CHAT, {**LATE, "Fault": "refuse-500"}),
    "late-200": (CHAT, {**LATE, "Fault": "error-200"}),
    "late-429-messages": (MESSAGES, {**LATE, "Fault": "status-429"}),
    "late-break": (CHAT, {**LATE, "Fault": "close-before-head"}),
    "late-break-messages": (MESSAGES, {**LATE, "Fault": "close-before-head"}),
    "quick": (CHAT, {"Pace-Ms": "100"}),
}
FAILED = [name for name in CASES if name.startswith(("late-5", "late-2", "late-4", "late-b"))]


@dataclass
class Observed:
    """A response: its head, its pieces and when they arrived (seconds after the request)."""

    status: int = 0
    headers: http.client.HTTPMessage = field(default_factory=http.client.HTTPMessage)
    head_arrived: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)


class HalfEvent:
    """An LM Studio that pauses in the middle of an event, and of a character."""

    EVENT = 'data: {"choices":[{"index":0,"delta":{"content":"hä"}}]}\n\n'.encode()
    PAUSE_AT = EVENT.index("ä".encode()) + 1

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            connection.recv(65536)
            head = (
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
            )
            connection.sendall(head + self.EVENT + self.EVENT[: self.PAUSE_AT])
            time.sleep(LONG + 1.5)
            connection.sendall(self.EVENT[self.PAUSE_AT :] + b"data: [DONE]\n\n")

    def stop(self) -> None:
        self.thread.join(30)
        self.listener.close()


def watch(gateway: Gateway, name: str, path: str, simulate: dict[str, str]) -> Observed:
    """Request a stream and record what arrives when, until the second comment."""
    content = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "count to 5"}],
        "stream": True,
        "max_tokens": 99,
    }
    headers = {"Content-Type": "application/json", "X-Case": name}
    headers |= {f"X-Simulator-{knob}": value for knob, value in simulate.items()}
    # a compressed stream gets no comments: one and a half times LONG shows that none arrives
    timeout = LONG * 1.5 if "gzip" in name else LONG * 3
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=timeout)
    began, observed = time.monotonic(), Observed()
    connection.request("POST", path, json.dumps(content), headers)
    response = connection.getresponse()
    observed.status, observed.headers = response.status, response.headers
    observed.head_arrived = time.monotonic() - began
    try:
        while observed.body.count(COMMENT) < 2 and (piece := response.read1(65536)):
            observed.pieces.append((time.monotonic() - began, piece))
    except (http.client.IncompleteRead, TimeoutError):
        pass
    finally:
        connection.close()
    return observed


@pytest.fixture(scope="module")
def observed(
    server: str,
    shared_gateway: Gateway,
    shared_simulator: Simulator,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Observed]:
    shared_simulator.reset()
    half = HalfEvent()
    folder = tmp_path_factory.mktemp("half")
    other = Gateway(folder, half.url, server, WEB_CONCURRENCY=1)
    with ThreadPoolExecutor(len(CASES) + 1) as pool:
        futures = {
            name: pool.submit(watch, shared_gateway, name, *case) for name, case in CASES.items()
        }
        futures["half-event"] = pool.submit(watch, other, "half-event", CHAT, {})
        found = {name: future.result() for name, future in futures.items()}
    half.stop()
    other.stop()
    return found


@pytest.fixture(scope="module")
def sent(observed: dict[str, Observed], shared_simulator: Simulator) -> dict[str, bytes]:
    """The bytes that LM Studio sent, by case."""
    return {dict(r["headers"])["X-Case"]: r["sent"] for r in shared_simulator.requests()}


def without_usage(stream: bytes) -> bytes:
    return re.sub(rb'data: \{[^\n]*"choices":\[\][^\n]*\n\n', b"", stream)


@pytest.mark.parametrize("case", ["silence", "silence-crlf"])
def test_a_silent_stream_gets_a_comment_every_ten_seconds(
    observed: dict[str, Observed], sent: dict[str, bytes], case: str
) -> None:
    response = observed[case]
    assert response.body == sent[case] + COMMENT * 2
    comments = [when for when, piece in response.pieces if piece == COMMENT]
    # counted from the request, because the tokens before the silence arrive at once
    for number, when in enumerate(comments, 1):
        assert LONG * number - 0.1 <= when <= LONG * number + 5


def test_a_stream_without_silences_gets_no_comment(
    observed: dict[str, Observed], sent: dict[str, bytes]
) -> None:
    assert observed["quick"].body == without_usage(sent["quick"])


def test_a_comment_never_comes_inside_an_event(observed: dict[str, Observed]) -> None:
    response = observed["half-event"]
    assert response.body == HalfEvent.EVENT * 2 + b"data: [DONE]\n\n"
    assert response.pieces[-1][0] >= LONG


def test_a_comment_never_comes_inside_a_compressed_stream(
    observed: dict[str, Observed], sent: dict[str, bytes]
) -> None:
    response = observed["silence-gzip"]
    assert response.headers["Content-Encoding"] == "gzip"
    assert response.body == sent["silence-gzip"]


@pytest.mark.parametrize("case", ["late", "late-messages"])
def test_the_response_to_a_late_stream_begins_with_a_comment(
    observed: dict[str, Observed], sent: dict[str, bytes], case: str
) -> None:
    response = observed[case]
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.head_arrived >= LONG - 0.1
    assert response.body == COMMENT + without_usage(sent[case])


@pytest.mark.parametrize("case", FAILED)
def test_a_late_failure_becomes_an_error_event(observed: dict[str, Observed], case: str) -> None:
    response = observed[case]
    assert response.status == 200
    assert response.body.startswith(COMMENT)
    event = response.body.removeprefix(COMMENT)
    named = b"event: error\n" if case.endswith("messages") else b""
    assert event.startswith(named + b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n\n") == 1
    data: dict[str, Any] = json.loads(event.removeprefix(named).removeprefix(b"data: "))
    if named:
        assert data["type"] == "error"
    else:
        assert set(data["error"]) == {"message", "type", "param", "code"}
    messages = {
        "late-500": "500 Internal Server Error",
        "late-200": "The model has crashed",
        "late-429-messages": "Too many requests.",
    }
    assert messages.get(case, "LM Studio broke off the stream") in data["error"]["message"]


def test_a_stream_never_has_ids_retries_or_empty_events(observed: dict[str, Observed]) -> None:
    for name in set(observed) - {"silence-gzip"}:
        body = observed[name].body.replace(b"\r\n", b"\n")
        assert not re.search(rb"^(id|retry)", body, re.MULTILINE), name
        events = [e for e in body.split(b"\n\n") if e and e + b"\n\n" != COMMENT]
        assert events, name
        assert all(re.search(rb"^data: .", event, re.MULTILINE) for event in events), name


def test_the_openai_package_ignores_the_comments(observed: dict[str, Observed]) -> None:
    from openai._streaming import SSEDecoder

    events = list(SSEDecoder().iter_bytes(iter([observed["late"].body])))
    assert [e.data for e in events if not e.data] == []
    chunks = [openai.types.chat.ChatCompletionChunk(**e.json()) for e in events[:-1]]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "1 2 3 4 5 "
