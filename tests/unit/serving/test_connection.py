"""Requests are read from a socket in whatever pieces they arrive; malformed ones are rejected."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.serving import response
from gateway.serving.parsing import MAX_HEAD, RequestRejected, parse
from gateway.serving.reading import ConnectionEnded, RequestBody, RequestReader
from gateway.serving.response import Response


class Pieces:
    """A socket on which these pieces arrive before the peer closes it."""

    def __init__(self, *arrivals: bytes) -> None:
        self._arrivals = list(arrivals)

    def settimeout(self, seconds: float) -> None:
        assert seconds > 0

    def recv(self, size: int) -> bytes:
        if not self._arrivals:
            return b""
        arrival = self._arrivals.pop(0)
        if len(arrival) > size:
            self._arrivals.insert(0, arrival[size:])
        return arrival[:size]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Split data into non-empty pieces at these places."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


def chunked(pieces: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in pieces if one) + b"0\r\n\r\n"


def read_all(read: Callable[[int], bytes], size: int) -> bytes:
    found = b""
    while piece := read(size):
        assert len(piece) <= size
        found += piece
    return found


@given(
    st.lists(st.binary(max_size=40)), st.lists(st.integers(0, 2000)), st.integers(1, 100)
)  # fmt: skip
def test_chunks_are_read_in_any_pieces_and_the_next_request_stays_in_the_buffer(
    pieces: list[bytes], places: list[int], size: int
) -> None:
    reader = RequestReader(Pieces(*cut(chunked(pieces) + b"GET / HTTP/1.1\r\n\r\n", places)))
    body = RequestBody(reader, None)
    assert read_all(body.read, size) == b"".join(pieces)
    assert body.done
    assert reader.head(1) == b"GET / HTTP/1.1"


@given(st.binary(max_size=300), st.lists(st.integers(0, 2000)), st.integers(1, 100))
def test_a_body_with_a_content_length_ends_there(
    content: bytes, places: list[int], size: int
) -> None:
    reader = RequestReader(Pieces(*cut(content + b"GET / HTTP/1.1\r\n\r\n", places)))
    body = RequestBody(reader, len(content))
    assert read_all(body.read, size) == content
    assert reader.head(1) == b"GET / HTTP/1.1"


@given(st.lists(st.binary(max_size=80), max_size=6))
def test_any_bytes_are_a_head_or_rejected_or_end_the_connection(arrivals: list[bytes]) -> None:
    with contextlib.suppress(RequestRejected, ConnectionEnded):
        parse(RequestReader(Pieces(*filter(None, arrivals))).head(1), {})


_BYTES = st.sampled_from([b"0", b"5", b"f", b"g", b"\r", b"\n", b"\r\n", b";", b"a=b", b" ", b":"])


@given(st.lists(_BYTES, max_size=12))
def test_any_chunks_are_a_body_or_rejected_or_end_the_connection(parts: list[bytes]) -> None:
    body = RequestBody(RequestReader(Pieces(b"".join(parts) or b"x")), None)
    try:
        body.read()
    except (RequestRejected, ConnectionEnded):
        assert body.broken
        with pytest.raises(RequestRejected):
            body.read()


@given(st.integers(0, 6), st.lists(st.integers(0, 2000)))
def test_empty_lines_before_a_request_are_skipped_in_any_pieces(
    count: int, places: list[int]
) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: a"
    reader = RequestReader(Pieces(*cut(count * b"\r\n" + head + b"\r\n\r\nrest", places)))
    assert reader.head(1) == head
    assert reader.read(4, time.monotonic() + 1) == b"rest"


class Trickle:
    """A socket on which data arrives byte by byte, and which counts the bytes."""

    def __init__(self, data: bytes, repeat: int = 1) -> None:
        self.received = 0
        self._data, self._size = data, len(data) * repeat

    def settimeout(self, seconds: float) -> None:
        assert seconds > 0

    def recv(self, size: int) -> bytes:
        if self.received == self._size:
            return b""
        at = self.received % len(self._data)
        self.received += 1
        return self._data[at : at + 1]


@pytest.mark.parametrize(
    ("data", "repeat", "status"),
    [
        (b"\r\n", 10**6, 431),
        (b"a", 10**6, 414),
        (b"GET / HTTP/1.1\r\nHost: " + b"h" * 10**6, 1, 431),
    ],
)
def test_a_head_that_arrives_byte_by_byte_is_bounded(data: bytes, repeat: int, status: int) -> None:
    client = Trickle(data, repeat)
    began = time.process_time()
    with pytest.raises(RequestRejected) as caught:
        RequestReader(client).head(60)
    assert caught.value.status == status
    assert client.received < MAX_HEAD + 100
    assert time.process_time() - began < 2  # generous: the work is linear


def body_of(*arrivals: bytes) -> RequestBody:
    return RequestBody(RequestReader(Pieces(*arrivals)), None)


def test_the_framing_of_a_chunked_body_is_bounded() -> None:
    """Chunks of two bytes take 3.5 bytes for each on the wire, chunks of one byte take 6."""
    assert body_of(b"2\r\nxy\r\n" * 100_000 + b"0\r\n\r\n").read() == b"xy" * 100_000
    assert body_of(b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n").read() == b"x" * 1000
    for hostile in (b"1\r\nx\r\n" * 100_000, b"9;a=" + b"b" * 4000 + b"\r\n123456789\r\n"):
        body = body_of(hostile * 20)
        with pytest.raises(RequestRejected, match="chunks of the body are too small"):
            body.read()
        assert body.rejected is not None
    trailers = b"x\r\n" + b"1\r\nx\r\n0\r\n" + b"T: %b\r\n" % (b"x" * 8000) * 20 + b"\r\n"
    with pytest.raises(RequestRejected, match="chunks of the body are too small"):
        body_of(trailers.removeprefix(b"x\r\n")).read()


def test_a_fast_client_lets_the_others_run() -> None:
    """Receiving does not wait for a client that is always faster than the gateway."""
    turns = []
    other = gevent.spawn(lambda: [turns.append(gevent.sleep(0)) for _ in range(1000)])
    body_of(*[b"ffff\r\n" + b"x" * 65535 + b"\r\n"] * 64, b"0\r\n\r\n").read()
    assert len(turns) >= 64 * 65536 // (256 * 1024)
    other.kill()


def test_half_of_an_empty_line_does_not_end_the_head() -> None:
    reader = RequestReader(
        Pieces(b"\r", b"\n", b"GET /v1/models HTTP/1.1\r", b"\nHost: a\r\n\r", b"\n")
    )
    assert reader.head(1) == b"GET /v1/models HTTP/1.1\r\nHost: a"


@pytest.mark.parametrize(
    ("head", "keep_alive"),
    [
        (b"GET / HTTP/1.1\r\nHost: h", True),
        (b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Close", False),
        (b"GET / HTTP/1.1\r\nHost: h\r\nConnection: upgrade, close", False),
        (b"GET / HTTP/1.0", False),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive", True),
    ],
)
def test_the_client_decides_whether_the_connection_is_kept_alive(
    head: bytes, keep_alive: bool
) -> None:
    assert parse(head, {}) == (keep_alive, 0)


def test_the_environ_of_a_request() -> None:
    environ: dict[str, Any] = {"wsgi.url_scheme": "http"}
    head = b"POST /v1/a%2Fb?x=%20#no HTTP/1.1\r\nHost: h\r\nAccept: a\r\naccept:b \r\nX_Y: no"
    assert parse(head + b"\r\nContent-Length: 007\r\nContent-Type: t", environ) == (True, 7)
    assert environ == {
        "wsgi.url_scheme": "http",
        "REQUEST_METHOD": "POST",
        "RAW_URI": "/v1/a%2Fb?x=%20#no",
        "PATH_INFO": "/v1/a/b",
        "QUERY_STRING": "x=%20",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "h",
        "HTTP_ACCEPT": "a,b",
        "CONTENT_LENGTH": "007",
        "CONTENT_TYPE": "t",
    }


@pytest.mark.parametrize(
    "host",
    [
        "gateway",
        "gateway:8002",
        "my_host.local",
        "10.0.0.1:80",
        "[::1]",
        "[fe80::1%25eth0]:1",
        "a:",
    ],
)
def test_a_well_formed_host_is_accepted(host: str) -> None:
    for version in ("1.0", "1.1"):
        parse(f"GET / HTTP/{version}\r\nHost: {host}".encode(), {})
    parse(f"GET http://{host}/v1 HTTP/1.1\r\nHost: other".encode(), {})


@pytest.mark.parametrize(
    "host",
    ["a b", "a/b", "a@b", "a:b@c", "a,b", "a:99999", "a:x", "a:1:2", "[::1", "::1", "a?b", "\xe9"],
)
def test_a_malformed_host_is_rejected(host: str) -> None:
    for version in ("1.0", "1.1"):
        with pytest.raises(RequestRejected, match="Host header is malformed"):
            parse(f"GET / HTTP/{version}\r\nHost: {host}".encode("latin-1"), {})


def test_only_http_1_0_may_lack_the_host() -> None:
    parse(b"GET / HTTP/1.0", {})
    with pytest.raises(RequestRejected, match="Host header is missing"):
        parse(b"GET / HTTP/1.1", {})
    with pytest.raises(RequestRejected, match="repeated"):
        parse(b"GET / HTTP/1.1\r\nHost: a\r\nHost: a", {})


@pytest.mark.parametrize(
    "target",
    [
        "health?x=a://b",
        "a/b://c",
        "://h/v1",
        "http://a@b/v1",
        "1://h/",
        "http:///v1",
        "ftp://h/",
        "http://h#/",
    ],
)
def test_only_an_absolute_form_target_may_lack_the_leading_slash(target: str) -> None:
    with pytest.raises(RequestRejected, match="target is malformed"):
        parse(f"GET {target} HTTP/1.1\r\nHost: h".encode(), {})


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    server, client = socket.socketpair()
    with server, client:
        yield server, client


def test_the_timeout_of_a_head_is_for_the_whole_head(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    server, client = pair
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.02):
            client.sendall(b"A")

    sender = threading.Thread(target=trickle)
    sender.start()
    try:
        with pytest.raises(TimeoutError):
            RequestReader(server).head(0.3)
    finally:
        stop.set()
        sender.join()


def test_an_application_that_fails_gets_a_500_and_its_connection_closes(
    pair: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    server, client = pair

    def failing_application(environ: dict[str, Any], start_response: Any) -> Any:
        environ["gateway.request_id"] = "mine"
        raise RuntimeError("a bug")

    environ: dict[str, Any] = {}
    parse(b"GET /v1/models HTTP/1.1\r\nHost: h", environ)
    with pytest.raises(ConnectionEnded):
        Response(server, environ, RequestBody(RequestReader(server), 0), True).send(
            failing_application
        )
    head, _, body = client.recv(65536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 500 ")
    assert b"\r\nX-Request-Id: mine" in head
    assert b"\r\nConnection: close" in head
    assert b'"type":"server_error"' in body
    assert b"a bug" not in body
    assert "a bug" in caplog.text


def test_100_continue_is_sent_once_and_only_when_the_body_is_read() -> None:
    sent: list[float] = []
    body = RequestBody(RequestReader(Pieces(b"abc")), 3, lambda: sent.append(time.monotonic()))
    assert not body.can_discard()
    assert sent == []
    assert (body.read(1), body.read(1), body.read()) == (b"a", b"b", b"c")
    assert len(sent) == 1


def test_a_client_that_does_not_read_ends_its_response(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = pair
    monkeypatch.setattr(response, "SEND_TIMEOUT", 0.1)
    closed: list[bool] = []

    class Endless(Iterator[bytes]):
        def __next__(self) -> bytes:
            return b"x" * 65536

        def close(self) -> None:
            closed.append(True)

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [])
        return Endless()

    environ: dict[str, Any] = {}
    parse(b"GET / HTTP/1.1\r\nHost: h", environ)
    body = RequestBody(RequestReader(server), 0)
    with pytest.raises(response.ClientStalled):
        Response(server, environ, body, True).send(application)
    assert closed == [True]
