"""Clients that trickle do not keep the others waiting, nor do they add up.

How long a single one is borne takes minutes to find out: ``python -m tests.faults.slow``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.stage import Patched
from tests.processes import Gateway, Simulator
from tests.wire.client import Client

CROWD = 60
CHAT = json.dumps(
    {"model": "qwen2-1.5b-instruct", "messages": [{"role": "user", "content": "count to 3"}]}
).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\n"
#: What a slow client has sent when it slows down, and what it sends a byte of at a time.
SLOW = {
    "head": (HEAD, b"X-Slow: " + 500 * b"a"),
    "request line": (b"POST /v1/", 500 * b"a"),
    "body": (HEAD + b"Content-Length: 9999\r\n\r\n{", 500 * b" "),
    "chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nfff\r\n{", 500 * b" "),
    "passed-on body": (
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: g\r\nContent-Length: 9999\r\n\r\n{",
        500 * b" ",
    ),
    "admin body": (
        b"POST /admin/models/load HTTP/1.1\r\nHost: g\r\nContent-Length: 9999\r\n\r\n{",
        500 * b" ",
    ),
}


@pytest.fixture
def trickle(gateway: Gateway) -> Iterator[Callable[[str], Callable[[], None]]]:
    """Open a crowd of slow clients; what is returned makes each send one byte more."""
    with ExitStack() as stack:

        def crowd(kind: str) -> Callable[[], None]:
            begin, rest = SLOW[kind]
            clients = [stack.enter_context(Client(gateway.port)) for _ in range(CROWD)]
            for client in clients:
                client.send(begin)
            position = iter(range(len(rest)))

            def step() -> None:
                at = next(position)
                for client in clients:
                    client.send(rest[at : at + 1])

            return step

        yield crowd


@pytest.mark.parametrize("kind", SLOW)
def test_others_are_served_beside_slow_clients(
    kind: str,
    trickle: Callable[[str], Callable[[], None]],
    gateway: Gateway,
    simulator: Simulator,
) -> None:
    workers = gateway.workers()
    step = trickle(kind)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        step()
        answer = gateway.http.post(f"{gateway.url}/v1/chat/completions", CHAT, timeout=20)
        assert answer.status_code == 200, answer.text
        assert gateway.get("/health", timeout=20).status_code == 200
    assert gateway.workers() == workers


def test_a_client_that_does_not_read_its_answer_keeps_nobody_waiting(
    gateway: Gateway, simulator: Simulator
) -> None:
    ask = HEAD + b"X-Simulator-Fault: big-answer\r\n" + b"Content-Length: %d\r\n\r\n" % len(CHAT)
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(Client(gateway.port)).send(ask + CHAT)
        for _ in range(10):
            answer = gateway.http.post(f"{gateway.url}/v1/chat/completions", CHAT, timeout=20)
            assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def impatient(
    shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway that waits for half a second only."""
    folder: Path = tmp_path_factory.mktemp("impatient")
    inside = "import gateway.connection; gateway.connection.BODY_TIMEOUT = 0.5"
    gateway = Patched(folder, shared_simulator.url, inside=inside, WEB_CONCURRENCY=1)
    yield gateway
    gateway.stop()


@pytest.mark.parametrize("kind", [kind for kind in SLOW if "line" not in kind and kind != "head"])
def test_a_body_that_came_too_slowly_is_told_so_and_its_connection_closes(
    kind: str, impatient: Gateway
) -> None:
    with Client(impatient.port) as client:
        client.send(SLOW[kind][0])
        answer = client.final()
        assert (answer.status, answer.header("Connection")) == ("408", "close")
        assert client.ends()
