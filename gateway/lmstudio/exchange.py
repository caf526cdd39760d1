"""One request that was sent to LM Studio, and its response as it arrives."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import requests
from gevent.socket import wait_read
from urllib3.connection import HTTPConnection

from gateway import sockets
from gateway.lmstudio import http1

READ_BYTES = 65536

#: Takes a connection back that can carry another exchange.
PutBack = Callable[[HTTPConnection], None]


class ConnectionBroken(Exception):
    """LM Studio closed or garbled an exchange."""


class Silence(Exception):
    """Nothing came within the given time; the exchange goes on."""


class Exchange(requests.Response):
    """One request that was sent to LM Studio, and its answer as it comes.

    ``status_code`` and ``headers`` are there after :meth:`wait_head`; :meth:`receive` gives the
    payload of one arrival. :meth:`abort` may be called from anywhere, the event loop included.
    """

    head: http1.Head

    def __init__(self, connection: HTTPConnection, method: str, put_back: PutBack) -> None:
        # requests.Response.__init__ makes a cookie jar and more, for every answer: not needed here
        self._content = False  # type: ignore[assignment]
        self._content_consumed = False
        self.history: list[requests.Response] = []
        self.raw: Any = self
        self.encoding = None
        self._put_back = put_back
        self._connection: HTTPConnection | None = connection
        self._socket: Any = connection.sock
        self._method = method
        self._buffer = b""
        self._body: http1.Body = http1.UntilClose()

    def wait_head(self, timeout: float | None) -> http1.Head:
        """Status and headers; raises Silence when they are not complete within ``timeout`` s."""
        deadline = None if timeout is None else time.monotonic() + timeout
        # Through the event loop once per request, even when the answer is there already: a busy
        # keep-alive connection would otherwise starve its neighbours.
        self._wait_readable(deadline)
        while True:
            head = self._take_head()
            if head is not None:
                return head
            self._fill(_remaining(deadline))

    def receive(self, timeout: float | None) -> bytes:
        """The payload of the next arrival; ``b""`` at the end of the answer.

        Raises Silence after ``timeout`` s without any, ConnectionBroken when the answer breaks off.
        """
        body = self._body
        while not body.done:
            if self._buffer:
                data, self._buffer = self._buffer, b""
                payload = self._feed(data)
                if payload:
                    return payload
            else:
                self._fill(timeout)
        return b""

    def read(self, amount: int | None = None, decode_content: bool = False) -> bytes:
        """For requests' own use (``.content``): the next arrival."""
        return self.receive(None)

    @property
    def complete(self) -> bool:
        """Whether the whole answer has been received."""
        return self._body.done

    def abort(self, reason: str = "") -> None:
        """Shut the connection at once; whoever waits on it sees it end, for this reason."""
        self.aborted = True
        self.abort_reason = self.abort_reason or reason
        self._reusable = False
        if self._connection is not None:
            sockets.shut(self._socket)

    def close(self) -> None:
        """Give the connection back when the answer is complete, else close it. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self.on_close is not None:
            self.on_close(self)
        if self._reusable and self._body.done and not self._body.excess and not self._buffer:
            self._put_back(connection)
        else:
            connection.close()

    _reusable = False
    #: Whether the exchange was cut from our side, and why, if the client is still there to know.
    aborted = False
    abort_reason = ""
    #: Called once, when the exchange gives up its connection.
    on_close: Callable[[Exchange], None] | None = None

    def _take_head(self) -> http1.Head | None:
        """The answer's head once the buffer has it whole; interim (1xx) heads are skipped."""
        while True:
            end, skip = _head_end(self._buffer)
            if end < 0:
                if len(self._buffer) > http1.MAX_HEAD_BYTES:
                    raise ConnectionBroken("the head of the answer is too large")
                return None
            try:
                head = http1.parse_head(self._buffer[:end])
                self._buffer = self._buffer[end + skip :]
                if head.status < 200:
                    if head.status == 101:
                        raise ConnectionBroken("LM Studio switched protocols")
                    continue
                self._body = http1.body_of(head, self._method)
            except http1.Malformed as fault:
                raise ConnectionBroken(str(fault)) from None
            self.head = head
            self.status_code = head.status
            self.reason = head.reason
            self._reusable = head.keep_alive
            return head

    def _feed(self, data: bytes) -> bytes:
        try:
            return self._body.feed(data)
        except http1.Malformed as fault:
            raise ConnectionBroken(str(fault)) from None

    def _fill(self, timeout: float | None) -> None:
        """Read what is there, waiting up to ``timeout`` s for it."""
        self._socket.settimeout(timeout)
        try:
            data = self._socket.recv(READ_BYTES)
        except TimeoutError:
            raise Silence from None
        except OSError as error:
            raise ConnectionBroken(error.strerror or "the connection broke") from None
        if data:
            self._buffer += data
            return
        self._ended()

    def _ended(self) -> None:
        try:
            if not hasattr(self, "head"):
                raise ConnectionBroken("LM Studio closed the connection without an answer")
            self._body.end()
        except http1.Malformed as fault:
            raise ConnectionBroken(str(fault)) from None

    def _wait_readable(self, deadline: float | None) -> None:
        if self._buffer:
            return
        try:
            wait_read(self._socket.fileno(), _remaining(deadline), Silence())
        except OSError as error:
            raise ConnectionBroken(error.strerror or "the connection broke") from None


def _head_end(buffer: bytes) -> tuple[int, int]:
    """Where the head ends and how many bytes the empty line has; -1 when it is not there yet."""
    end = buffer.find(b"\r\n\r\n")
    if end >= 0:
        return end, 4
    return buffer.find(b"\n\n"), 2


def _remaining(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.001, deadline - time.monotonic())
