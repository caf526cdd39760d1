"""Requests in as many pieces as possible, or with lines that are hard to parse, delay nobody."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from tests.processes import Gateway, Simulator, eventually

pytestmark = pytest.mark.both_servers

#: Hostile clients at a time, each with one request after another.
CLIENTS = 2
#: Requests of the neighbour, one after another.
NEIGHBOURS = 25
HOST = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
)
#: What the hostile clients send: a beginning, and what follows it again and again.
FLOODS = {
    "chunks of one byte": (CHUNKED, b"1\r\nx\r\n" * 100_000),
    "a line of blanks": (HOST + b"X: a" + b" " * 57_000 + b"b\r\n\r\n", b""),
    "lines of blanks and a control byte": (
        HOST + (b"X:" + b" " * 8_000 + b"\x01\r\n") * 8 + b"\r\n",
        b"",
    ),
    "empty lines": (b"", b"\r\n" * 100_000),
}
#: A head that is as large as allowed, sent byte by byte.
HEAD = HOST + (b"X: " + b"x" * 8_000 + b"\r\n") * 8 + b"Connection: close\r\n\r\n"


@pytest.fixture(scope="module")
def single(
    server: str, shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway with one worker, which serves the hostile clients and their neighbour."""
    folder = tmp_path_factory.mktemp("single")
    gateway = Gateway(folder, shared_simulator.url, server, WEB_CONCURRENCY=1)
    yield gateway
    gateway.stop()


class Hostile:
    """Clients that run ``attack`` with a new connection again and again, in threads."""

    def __init__(self, port: int, attack: Callable[[socket.socket, threading.Event], None]) -> None:
        self.attacks = 0
        self._port, self._attack = port, attack
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]

    def __enter__(self) -> Hostile:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(90)

    def _run(self) -> None:
        while not self._stopping.is_set():
            with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 30) as one:
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.attacks += 1
                self._attack(one, self._stopping)


def check_neighbour(gateway: Gateway, hostile: Hostile) -> None:
    """``/health`` must be served before the worker has spent a second on the hostile clients."""
    workers = gateway.workers()
    eventually(lambda: hostile.attacks >= CLIENTS)
    for _ in range(NEIGHBOURS):
        began = gateway.processor_time()
        assert gateway.get("/health", timeout=60).status_code == 200
        assert gateway.processor_time() - began < 1
    assert gateway.workers() == workers


@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_delays_no_other_client(kind: str, single: Gateway) -> None:
    beginning, rest = FLOODS[kind]

    def flood(client: socket.socket, stopping: threading.Event) -> None:
        client.sendall(beginning)
        while rest and not stopping.is_set():
            client.sendall(rest)
        while client.recv(65536):  # without this, the next attack would begin at once
            pass

    with Hostile(single.port, flood) as hostile:
        check_neighbour(single, hostile)


def test_a_head_sent_byte_by_byte_is_served_and_delays_no_other_client(single: Gateway) -> None:
    received: list[bytes] = []

    def dribble(client: socket.socket, stopping: threading.Event) -> None:
        for at in range(len(HEAD)):
            client.send(HEAD[at : at + 1])
        received.append(client.recv(15))

    with Hostile(single.port, dribble) as hostile:
        check_neighbour(single, hostile)
        eventually(lambda: received)
    assert set(received) == {b"HTTP/1.1 200 OK"}
