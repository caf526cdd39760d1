"""Slow clients do not delay the others, however many there are.

How long the gateway serves a single one takes minutes to measure: ``python -m tests.faults.slow``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gateway.serving import connection
from tests.faults.harness import Patched
from tests.processes import Gateway, Simulator, eventually
from tests.wire.client import Client

SLOW_CLIENTS = 60
CHAT = json.dumps(
    {"model": "qwen2-1.5b-instruct", "messages": [{"role": "user", "content": "count to 3"}]}
).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
REQUEST = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
#: What a slow client sends at once, and what it then sends byte by byte.
SLOW = {
    "head": (HEAD, b"X-Slow: " + 500 * b"a"),
    "request line": (b"POST /v1/", 500 * b"a"),
    "body": (HEAD + b"Content-Length: 9999\r\n\r\n{", 500 * b" "),
    "chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nfff\r\n{", 500 * b" "),
    "streamed body": (
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Length: 9999\r\n\r\n{",
        500 * b" ",
    ),
    "admin body": (
        b"POST /admin/models/load HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 9999\r\n\r\n{",
        500 * b" ",
    ),
}


@pytest.fixture
def trickle(gateway: Gateway) -> Iterator[Callable[[str], Callable[[], None]]]:
    """Open slow clients of a kind; the function returned lets each send one more byte."""
    with ExitStack() as stack:

        def open_clients(kind: str) -> Callable[[], None]:
            beginning, rest = SLOW[kind]
            clients = [stack.enter_context(Client(gateway.port)) for _ in range(SLOW_CLIENTS)]
            for client in clients:
                client.send(beginning)
            position = iter(range(len(rest)))

            def step() -> None:
                at = next(position)
                for client in clients:
                    client.send(rest[at : at + 1])

            return step

        yield open_clients


@pytest.mark.parametrize("kind", SLOW)
def test_other_clients_are_served_next_to_slow_ones(
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
        response = gateway.http.post(f"{gateway.url}/v1/chat/completions", CHAT, timeout=20)
        assert response.status_code == 200, response.text
        assert gateway.get("/health", timeout=20).status_code == 200
    assert gateway.workers() == workers


def test_a_client_that_does_not_read_its_response_delays_nobody(
    gateway: Gateway, simulator: Simulator
) -> None:
    request = (
        HEAD + b"X-Simulator-Fault: big-response\r\n" + b"Content-Length: %d\r\n\r\n" % len(CHAT)
    )
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(Client(gateway.port)).send(request + CHAT)
        for _ in range(10):
            response = gateway.http.post(f"{gateway.url}/v1/chat/completions", CHAT, timeout=20)
            assert response.status_code == 200, response.text


@pytest.fixture(scope="module")
def short_timeout(
    shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway that waits for each piece of a body for half a second only."""
    folder: Path = tmp_path_factory.mktemp("short-timeout")
    inside = "import gateway.serving.reading; gateway.serving.reading.BODY_TIMEOUT = 0.5"
    gateway = Patched(folder, shared_simulator.url, inside=inside, WEB_CONCURRENCY=1)
    yield gateway
    gateway.stop()


@pytest.mark.parametrize("kind", [kind for kind in SLOW if "line" not in kind and kind != "head"])
def test_a_body_that_arrives_too_slowly_gets_a_408_and_its_connection_closes(
    kind: str, short_timeout: Gateway
) -> None:
    with Client(short_timeout.port) as client:
        client.send(SLOW[kind][0])
        response = client.final()
        assert (response.status, response.header("Connection")) == ("408", "close")
        assert client.is_closed()


@pytest.fixture
def patched(simulator: Simulator, tmp_path: Path) -> Iterator[Callable[[str], Gateway]]:
    """Starts a gateway with other constants in :mod:`gateway.serving.connection`."""
    with ExitStack() as stack:

        def start(constants: str) -> Gateway:
            inside = f"import gateway.serving.connection as c; {constants}"
            gateway = Patched(tmp_path, simulator.url, inside=inside, WEB_CONCURRENCY=1)
            stack.callback(gateway.stop)
            return gateway

        yield start


def test_the_first_head_has_10_seconds_and_each_further_one_65() -> None:
    assert (connection.FIRST_HEAD, connection.KEEP_ALIVE) == (10, 65)


@pytest.mark.parametrize("sent", [b"", HEAD], ids=["nothing", "half a head"])
def test_a_connection_whose_first_head_is_late_closes_and_others_stay(
    sent: bytes, patched: Callable[[str], Gateway]
) -> None:
    gateway = patched("c.FIRST_HEAD, c.KEEP_ALIVE = 2.0, 600.0")
    with Client(gateway.port) as served, Client(gateway.port) as late:
        served.send(REQUEST)
        assert served.final().status == "200"
        late.send(sent)
        assert late.is_closed()
        # it has waited for its next head for longer than the late one for its first
        served.send(REQUEST)
        assert served.final().status == "200"


def test_no_byte_prolongs_the_time_of_a_head(patched: Callable[[str], Gateway]) -> None:
    gateway = patched("c.FIRST_HEAD, c.KEEP_ALIVE = 2.0, 600.0")
    with Client(gateway.port) as late:
        late.send(HEAD + b"X-Slow: ")
        late.sock.settimeout(0.1)

        def closed() -> bool:
            late.send(b"a")
            try:
                return not late.sock.recv(1)
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        eventually(closed)


def test_a_connection_whose_next_head_is_late_closes_and_new_ones_stay(
    patched: Callable[[str], Gateway],
) -> None:
    gateway = patched("c.FIRST_HEAD, c.KEEP_ALIVE = 600.0, 0.5")
    with Client(gateway.port) as late, Client(gateway.port) as silent:
        late.send(REQUEST)
        assert late.final().status == "200"
        assert late.is_closed()
        silent.send(REQUEST)
        assert silent.final().status == "200"
