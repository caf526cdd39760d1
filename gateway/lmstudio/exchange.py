"""One request to LM Studio, from before it has a connection to the last byte of its response."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any, Protocol, cast

import gevent
import requests
from gevent.socket import wait_read
from urllib3.connection import HTTPConnection

from gateway.clock import remaining
from gateway.lmstudio import http1, sockets
from gateway.lmstudio.sending import YIELD_BYTES, NothingSent, pieces_of, send

#: The maximum size of one arrival, in bytes.
READ_BYTES = 65536
#: What an arrival counts at least towards :data:`.YIELD_BYTES`, since a small one costs time too.
_LEAST_COST = 1024


class ConnectionBroken(Exception):
    """LM Studio closed the connection, or sent something that is not HTTP."""


class ReadTimeout(Exception):
    """Nothing arrived within the timeout. The exchange goes on and can be read again."""


class Pool(Protocol):
    """Where an exchange gets its connection, and returns one that can carry another exchange."""

    def take_idle(self) -> HTTPConnection | None: ...

    def connect(self) -> HTTPConnection: ...

    def put_back(self, connection: HTTPConnection) -> None: ...


class Exchange(requests.Response):
    """One request to LM Studio, and its response as it arrives.

    :meth:`send` opens a connection and sends; :meth:`wait_head` sets ``head`` and ``status_code``;
    :meth:`receive` returns the payload of one arrival. :meth:`abort` may be called at any time and
    from anywhere, the event loop included.
    """

    head: http1.Head

    def __init__(self, pool: Pool, request: requests.PreparedRequest) -> None:
        # not super().__init__(), which makes a cookie jar and more for every response
        self._content = False  # type: ignore[assignment]
        self._content_consumed = False
        self.history: list[requests.Response] = []
        self.encoding = None
        self.request = request
        self.url = cast(str, request.url)
        self._pool = pool
        self._connection: HTTPConnection | None = None
        self._socket: Any = None
        self._method = cast(str, request.method)
        self._buffer = bytearray()
        self._searched = 0  # bytes of the buffer that hold no end of the head
        self._body: http1.Body = http1.UntilClose()

    # a property, since an attribute would be a reference cycle that keeps the request's body
    @property
    def raw(self) -> Any:  # type: ignore[override]
        """The object that requests' own methods read from: the exchange itself."""
        return self

    def send(self) -> None:
        """Send the request, over an idle connection or a new one.

        Raises Unreachable when no connection can be opened, ConnectionBroken when it fails,
        UpstreamTimeout when LM Studio does not take the request, and whatever iterating the body
        raises. The request is sent again only if the connection failed before its first byte.
        """
        connection = self._pool.take_idle()
        if connection is not None:
            self._reused = True
            try:
                self._send_over(connection)
                return
            except NothingSent:
                self._disconnect()
        self._send_over_new()

    def wait_head(self, timeout: float | None) -> http1.Head:
        """Wait for status and headers; raises ReadTimeout after ``timeout`` seconds.

        A GET or HEAD is sent again, once, if LM Studio had closed the pooled connection.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            return self._wait_head(deadline)
        except ConnectionBroken:
            if not self._can_repeat():
                raise
        self._disconnect()
        self._send_over_new()
        return self._wait_head(deadline)

    def receive(self, timeout: float | None) -> bytes:
        """Return the payload of the next arrival; ``b""`` at the end of the response.

        Raises ReadTimeout after ``timeout`` seconds without an arrival, ConnectionBroken when the
        response breaks off.
        """
        body = self._body
        if self._buffer and not body.done:
            data = bytes(self._buffer)
            self._buffer.clear()
            payload = self._feed(data)
            if payload:
                return payload
        while not body.done:
            data = self._read(timeout)
            if not data:
                self._ended()
                break
            payload = self._feed(data)
            if payload:
                return payload
        return b""

    def read(self, amount: int | None = None, decode_content: bool = False) -> bytes:
        """Return the next arrival, for the methods that Exchange inherits (``.content``)."""
        return self.receive(None)

    @property
    def complete(self) -> bool:
        """Whether the whole response has been received."""
        return self._body.done

    def abort(self, reason: str = "") -> None:
        """Shut the connection down at once: whoever uses the exchange gets ConnectionBroken.

        ``reason`` is for the client; it is empty if the client has disconnected.
        """
        self.aborted = True
        self.abort_reason = self.abort_reason or reason
        self._reusable = False
        if self._connection is not None:
            sockets.shut(self._socket)

    def close(self) -> None:
        """Return the connection to the pool if the response is complete, else close it.

        Further calls do nothing.
        """
        if self._closed:
            return
        self._closed = True
        self._drop_body()
        if self.on_close is not None:
            self.on_close(self)
        whole = self._body.done and not self._body.excess and not self._buffer
        if self._connection is not None and self._reusable and whole:
            connection, self._connection = self._connection, None
            self._pool.put_back(connection)
        self._disconnect()

    _closed = False
    _reusable = False
    _reused = False  # whether the connection comes from the pool
    _sent_whole = False
    _answered = False  # whether a byte of the response has arrived
    _unyielded = 0
    #: Whether the gateway aborted the exchange, and the reason to give to a client that is still
    #: connected.
    aborted = False
    abort_reason = ""
    #: Called once, when the exchange releases its connection.
    on_close: Callable[[Exchange], None] | None = None
    #: Called once, when the exchange needs the request's body no more: at the first byte of the
    #: response, until which the request may have to be sent again.
    on_body_dropped: Callable[[], None] | None = None

    def _send_over(self, connection: HTTPConnection) -> None:
        self._connection, self._socket = connection, connection.sock
        self._check_not_aborted()
        request = self.request
        headers, body = cast("dict[str, str]", request.headers), cast(Any, request.body)
        pieces = pieces_of(self._method, self.url, headers, body)
        self._sent_whole = send(self._socket, pieces)
        self._check_not_aborted()

    def _send_over_new(self) -> None:
        self._check_not_aborted()
        self._reused = False
        try:
            self._send_over(self._pool.connect())
        except NothingSent:
            raise ConnectionBroken("LM Studio closed the connection") from None

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _check_not_aborted(self) -> None:
        if self.aborted:
            raise ConnectionBroken("the exchange was aborted")

    def _can_repeat(self) -> bool:
        """Whether the request, which failed, can be sent again without an effect that it must have
        only once."""
        body: Any = self.request.body
        return (
            self._reused
            and not (self._answered or self.aborted)
            and self._method in ("GET", "HEAD")
            and (body is None or isinstance(body, bytes))
        )

    def _drop_body(self) -> None:
        self.request.body = None
        dropped, self.on_body_dropped = self.on_body_dropped, None
        if dropped is not None:
            dropped()

    def _wait_head(self, deadline: float | None) -> http1.Head:
        # Yield to the event loop once per request, even if the response has arrived already: a busy
        # keep-alive connection would otherwise starve the others.
        self._wait_readable(deadline)
        while True:
            head = self._take_head()
            if head is not None:
                return head
            data = self._read(remaining(deadline))
            if not data:
                raise ConnectionBroken("the connection closed before a response arrived")
            self._buffer += data

    def _take_head(self) -> http1.Head | None:
        """Parse the head once the buffer holds all of it, skipping interim (1xx) heads."""
        while True:
            end, skip = _head_end(self._buffer, self._searched)
            if (end if end >= 0 else len(self._buffer)) > http1.MAX_HEAD_BYTES:
                raise ConnectionBroken("the head of the response is too large")
            if end < 0:
                # the end may be cut anywhere in its three bytes
                self._searched = max(0, len(self._buffer) - 2)
                return None
            block = bytes(self._buffer[:end]).removesuffix(b"\r")
            del self._buffer[: end + skip]
            self._searched = 0
            try:
                head = http1.parse_head(block)
                if head.status < 200:
                    if head.status == 101:
                        raise ConnectionBroken("unexpected switch of protocols")
                    continue
                self._body = http1.body_of(head, self._method)
            except http1.Malformed as fault:
                raise ConnectionBroken(str(fault)) from None
            self.head = head
            self.status_code = head.status
            self.reason = head.reason
            self._reusable = head.keep_alive and self._sent_whole and not self.aborted
            return head

    def _feed(self, data: bytes) -> bytes:
        try:
            return self._body.feed(data)
        except http1.Malformed as fault:
            raise ConnectionBroken(str(fault)) from None

    def _read(self, timeout: float | None) -> bytes:
        """Read what has arrived, waiting up to ``timeout`` seconds for something."""
        if self._unyielded >= YIELD_BYTES:
            self._unyielded = 0
            gevent.sleep(0)
        self._socket.settimeout(timeout)
        try:
            data: bytes = self._socket.recv(READ_BYTES)
        except OSError as error:
            # the kernel's ETIMEDOUT, which is a TimeoutError too, means that LM Studio is gone
            if isinstance(error, TimeoutError) and error.errno != errno.ETIMEDOUT:
                raise ReadTimeout from None
            raise _broken(error) from None
        self._unyielded += max(len(data), _LEAST_COST)
        if data and not self._answered:
            self._answered = True
            self._drop_body()
        return data

    def _ended(self) -> None:
        self._check_not_aborted()
        try:
            self._body.end()
        except http1.Malformed as fault:
            raise ConnectionBroken(str(fault)) from None

    def _wait_readable(self, deadline: float | None) -> None:
        if self._buffer:
            return
        try:
            wait_read(self._socket.fileno(), remaining(deadline), ReadTimeout())
        except OSError as error:
            raise _broken(error) from None


def _head_end(buffer: bytearray, start: int) -> tuple[int, int]:
    """Return where the head ends (-1: not yet) and the length of the line ends that end it.

    A line may end with LF alone. ``start`` is where to begin the search.
    """
    bare = buffer.find(b"\n\n", start)
    end = buffer.find(b"\n\r\n", start, len(buffer) if bare < 0 else bare + 2)
    return (bare, 2) if end < 0 else (end, 3)


def _broken(error: OSError) -> ConnectionBroken:
    return ConnectionBroken(error.strerror or "the connection failed")
