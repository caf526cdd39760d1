"""One exchange over real sockets: sending, repeating, aborting, and what it keeps in memory."""

from __future__ import annotations

import errno
import gc
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import requests

from gateway.errors import UpstreamTimeout
from gateway.lmstudio import adapter, sending
from gateway.lmstudio.exchange import ConnectionBroken, Exchange, ReadTimeout
from tests.lm_studio import Server, answering, read_head, served
from tests.processes import eventually

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
BIG = b"x" * (20 << 20)


def whole(exchange: Exchange) -> bytes:
    """Send a request and return the body of its response."""
    try:
        exchange.send()
        exchange.wait_head(10)
        pieces = []
        while piece := exchange.receive(10):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        exchange.close()


class Canned:
    """A connection, and the pool that it comes from, whose arrivals are given."""

    def __init__(self, *arrivals: bytes | OSError) -> None:
        self.sock = self
        self.arrivals = list(arrivals)
        self._pair = socket.socketpair()
        self._pair[1].sendall(b"x")  # readable

    def take_idle(self) -> Any:
        return None

    def connect(self) -> Any:
        return self

    def put_back(self, connection: Any) -> None:
        self.close()

    def fileno(self) -> int:
        return self._pair[0].fileno()

    def settimeout(self, timeout: float | None) -> None:
        pass

    def send(self, data: memoryview) -> int:
        return len(data)

    def recv(self, size: int) -> bytes:
        arrival = self.arrivals.pop(0) if self.arrivals else b""
        if isinstance(arrival, OSError):
            raise arrival
        return arrival

    def close(self) -> None:
        for one in self._pair:
            one.close()


@pytest.fixture
def lm_studio() -> Iterator[Server]:
    with served(answering(OK, OK, OK)) as server:
        yield server


def canned(pool: Canned) -> Exchange:
    """An exchange over a canned connection, without a server."""
    request = requests.PreparedRequest()
    request.method, request.url = "GET", "/v1/models"
    request.headers = {"Host": "lmstudio"}  # type: ignore[assignment]
    return Exchange(pool, request)


def test_a_head_that_arrives_byte_by_byte_takes_linear_time() -> None:
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 100) for number in range(2000))
    response = b"HTTP/1.1 200 OK\r\n" + lines + b"Content-Length: 0\r\n\r\n"
    pool = Canned(*(bytes([byte]) for byte in response))
    exchange = canned(pool)
    pool.arrivals.reverse()
    pool.recv = lambda size: pool.arrivals.pop()  # type: ignore[assignment, return-value, method-assign]
    began = time.process_time()
    exchange.send()
    head = exchange.wait_head(60)
    # 1 s on a slow machine; searching all of the buffer each time takes ten times as long
    assert time.process_time() - began < 4
    assert len(head.headers) == 2001
    exchange.close()


@pytest.mark.parametrize("end", [b"\r\n\r\n", b"\n\n", b"\n\r\n", b"\r\n\n"])
@pytest.mark.parametrize("split", [False, True])
def test_a_head_ends_at_its_first_empty_line(end: bytes, split: bool) -> None:
    response = b"HTTP/1.1 200 OK\nX: y\nContent-Length: 10" + end + b"a\n\nb\r\n\r\ncd"
    pieces = [bytes([byte]) for byte in response] if split else [response]
    exchange = canned(Canned(*pieces))
    assert whole(exchange) == b"a\n\nb\r\n\r\ncd"
    assert exchange.head.headers == [("X", "y"), ("Content-Length", "10")]


def test_a_head_that_is_too_large_is_rejected() -> None:
    line = b"X: " + b"a" * 1000 + b"\r\n"
    exchange = canned(Canned(b"HTTP/1.1 200 OK\r\n", *[line] * 300, b"\r\n"))
    with pytest.raises(ConnectionBroken, match="too large"):
        whole(exchange)


@pytest.mark.parametrize("framing", [b"", b"Content-Length: 100\r\n"])
def test_a_connection_that_the_kernel_gives_up_is_broken_and_not_silent(framing: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n"
    exchange = canned(Canned(head, b"data", OSError(errno.ETIMEDOUT, "Connection timed out")))
    exchange.send()
    exchange.wait_head(1)
    assert exchange.receive(1) == b"data"
    with pytest.raises(ConnectionBroken, match="timed out"):
        exchange.receive(1)
    exchange.close()


def test_an_arrival_that_is_late_is_no_failure() -> None:
    exchange = canned(Canned(b"HTTP/1.1 200 OK\r\n\r\n", TimeoutError("timed out"), b"data"))
    exchange.send()
    exchange.wait_head(1)
    with pytest.raises(ReadTimeout):
        exchange.receive(0.1)
    assert exchange.receive(1) == b"data"
    exchange.close()


@pytest.mark.parametrize("reply", [OK, b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n{}", b""])
def test_an_exchange_is_freed_without_the_garbage_collector(reply: bytes) -> None:
    with served(answering(reply)) as server:
        gc.disable()
        try:
            exchange = server.exchange("POST", b"body")
            freed = weakref.ref(exchange)
            with suppress(ConnectionBroken):
                whole(exchange)
            del exchange
            assert freed() is None
        finally:
            gc.enable()


def test_the_body_is_kept_until_the_first_byte_of_the_response() -> None:
    asked, answer = threading.Event(), threading.Event()

    def script(connection: socket.socket) -> None:
        read_head(connection)
        asked.set()
        answer.wait(10)
        connection.sendall(b"HTTP")
        connection.recv(65536)

    dropped = []
    with served(script) as server:
        exchange = server.exchange("POST", b"body")
        exchange.on_body_dropped = lambda: dropped.append(exchange.request.body)
        exchange.send()
        with pytest.raises(ReadTimeout):
            exchange.wait_head(0.05)
        assert (dropped, exchange.request.body) == ([], b"body")
        answer.set()

        def arrived() -> bool:
            with pytest.raises(ReadTimeout):
                exchange.wait_head(0.05)
            return bool(dropped)

        eventually(arrived)
        assert dropped == [None]
        exchange.close()
        assert dropped == [None]


def test_sending_to_a_server_that_does_not_read_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "SEND_TIMEOUT", 0.2)
    ended = threading.Event()
    with served(lambda connection: ended.wait(10) and None) as server:
        exchange = server.exchange("POST", BIG)
        with pytest.raises(UpstreamTimeout):
            exchange.send()
        exchange.close()
        ended.set()


def test_an_early_response_is_read_although_the_request_was_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # how long LM Studio has to respond without reading
    monkeypatch.setattr(sending, "SEND_TIMEOUT", 2)
    ended = threading.Event()

    def script(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        ended.wait(10)

    with served(script) as server:
        exchange = server.exchange("POST", BIG)
        exchange.send()
        assert exchange.wait_head(5).status == 413
        exchange.close()
        assert server.adapter.take_idle() is None  # half of a request stands in it
        ended.set()


def test_aborting_ends_a_request_that_is_being_sent() -> None:
    ended = threading.Event()
    with served(lambda connection: ended.wait(10) and None) as server:
        exchange = server.exchange("POST", BIG)
        threading.Timer(0.2, exchange.abort, ["why"]).start()
        with pytest.raises(ConnectionBroken):
            exchange.send()
        assert exchange.abort_reason == "why"
        exchange.close()
        ended.set()


def test_an_exchange_that_was_aborted_before_it_began_is_not_sent(lm_studio: Server) -> None:
    exchange = lm_studio.exchange()
    exchange.abort()
    with pytest.raises(ConnectionBroken):
        exchange.send()
    exchange.close()
    assert lm_studio.accepted == 0


def test_an_aborted_response_without_a_length_is_not_complete() -> None:
    def script(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\ndata")
        connection.recv(65536)

    with served(script) as server:
        exchange = server.exchange()
        exchange.send()
        exchange.wait_head(5)
        assert exchange.receive(5) == b"data"
        exchange.abort()
        with pytest.raises(ConnectionBroken):
            exchange.receive(5)
        assert not exchange.complete
        exchange.close()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_get_is_sent_again_when_the_pooled_connection_is_closed(method: str) -> None:
    def closes_on_reuse(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(OK)
        read_head(connection)

    with served(closes_on_reuse, answering(OK)) as server:
        assert whole(server.exchange()) == b"{}"
        exchange = server.exchange(method)
        assert whole(exchange) == (b"{}" if method == "GET" else b"")
        assert (exchange.head.status, server.accepted) == (200, 2)


@pytest.mark.parametrize(
    ("method", "replies"),
    [
        ("POST", [OK, b""]),  # may have had an effect
        ("GET", [OK, b"H"]),  # the response had begun
        ("GET", [b""]),  # a new connection
    ],
)
def test_any_other_request_is_not_sent_again(method: str, replies: list[bytes]) -> None:
    with served(answering(*replies)) as server:
        for _ in replies[1:]:
            assert whole(server.exchange()) == b"{}"
        with pytest.raises(ConnectionBroken):
            whole(server.exchange(method))
        assert server.accepted == 1


def test_connections_have_tcp_keep_alive(lm_studio: Server) -> None:
    connection: Any = lm_studio.adapter.connect()
    options = adapter.keep_alive_options()
    assert len(options) > 3
    assert all(connection.sock.getsockopt(level, name) for level, name, _ in options)
    for level, name, value in options[1:]:
        assert connection.sock.getsockopt(level, name) == value
    assert adapter.DEAD_AFTER + adapter.KEEP_ALIVE_INTERVAL <= 60
    connection.close()
