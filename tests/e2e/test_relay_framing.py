"""LM Studio's framing never becomes the client's."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.processes import Gateway
from tests.raw_http import exchange, request

LENGTH = b"Content-Length: 5\r\n"


class Canned:
    """An LM Studio that answers every request with the same bytes and closes the connection."""

    def __init__(self) -> None:
        self.response = b""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(self.response)

    def stop(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(10)


@pytest.fixture(scope="module")
def lm_studio() -> Iterator[Canned]:
    server = Canned()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def answered(
    lm_studio: Canned, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., tuple[int, dict[str, str], bytes]]]:
    """Asks a gateway whose LM Studio answers with given bytes; returns status, headers and body."""
    gateway = Gateway(tmp_path_factory.mktemp("gateway"), lm_studio.url, WEB_CONCURRENCY=1)

    def ask(response: bytes, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        lm_studio.response = response
        head, _, body = exchange(gateway.port, request(method, "/v1/x")).partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        pairs = [line.split(": ", 1) for line in lines[1:]]
        found = {name.lower(): value for name, value in pairs}
        assert len(found) == len(pairs), lines  # no header twice
        return int(lines[0].split()[1]), found, body

    yield ask
    gateway.stop()


Ask = Callable[..., tuple[int, dict[str, str], bytes]]


def test_chunked_wins_over_a_length(answered: Ask) -> None:
    status, headers, body = answered(
        b"HTTP/1.1 200 OK\r\n" + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n"
        b"14\r\n{}HTTP/1.1 403 Split\r\n0\r\n\r\n"
    )
    assert (status, headers.get("content-length")) == (200, None)
    assert body == b"14\r\n{}HTTP/1.1 403 Split\r\n0\r\n\r\n"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_equal_lengths_become_one(answered: Ask, method: str) -> None:
    status, headers, body = answered(b"HTTP/1.1 200 OK\r\n" + LENGTH * 2 + b"\r\nhello", method)
    assert (status, headers["content-length"]) == (200, "5")
    assert body == (b"hello" if method == "GET" else b"")


@pytest.mark.parametrize("lines", [LENGTH + b"Content-Length: 6\r\n", b"Content-Length: 5x\r\n"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_other_lengths_are_502(answered: Ask, method: str, lines: bytes) -> None:
    assert answered(b"HTTP/1.1 200 OK\r\n" + lines + b"\r\nhello", method)[0] == 502


def test_a_304_with_a_malformed_length_is_502(answered: Ask) -> None:
    assert answered(b"HTTP/1.1 304 X\r\nContent-Length: 5\r\n\r\n")[0] == 304
    assert answered(b"HTTP/1.1 304 X\r\nContent-Length: +5\r\n\r\n")[0] == 502


@pytest.mark.parametrize(
    "framing",
    [b"Content-Length: 0\r\n\r\n", b"\r\n", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"],
)
def test_an_empty_error_becomes_an_error_object(answered: Ask, framing: bytes) -> None:
    status, headers, body = answered(b"HTTP/1.1 500 Oh\r\nRetry-After: 7\r\n" + framing)
    assert (status, headers["retry-after"]) == (500, "7")
    assert b'"message":"LM Studio answered 500."' in body


def test_an_error_for_head_stays_empty(answered: Ask) -> None:
    status, _, body = answered(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", "HEAD")
    assert (status, body) == (404, b"")


@pytest.mark.parametrize("own", [b"", b"X-Content-Type-Options: sniff\r\n"])
@pytest.mark.parametrize("status", [b"200", b"500"])
def test_relayed_responses_are_not_sniffed(answered: Ask, own: bytes, status: bytes) -> None:
    _, headers, _ = answered(b"HTTP/1.1 " + status + b" X\r\n" + own + LENGTH + b"\r\nhello")
    assert headers["x-content-type-options"] == "nosniff"
