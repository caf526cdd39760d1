"""One request that was sent to LM Studio, and its response as it arrives."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import requests
from gevent.socket import wait_read
from urllib3.connection import HTTPConnection

from gateway import sockets
from gateway.clock import remaining
from gateway.lmstudio import http1

#: The maximum size of one arrival, in bytes.
READ_BYTES = 65536

#: Returns to the pool a connection that can carry another exchange.
PutBack = Callable[[HTTPConnection], None]


class ConnectionBroken(Exception):
    """LM Studio closed the connection, or sent something that is not HTTP."""


class ReadTimeout(Exception):
    """Nothing arrived within the timeout. The exchange goes on and can be read again."""


class Exchange(requests.Response):
    """One request that was sent to LM Studio, and its response as it arrives.

    :meth:`wait_head` sets ``head`` and ``status_code``; :meth:`receive` returns the payload of one
    arrival. :meth:`abort` may be called from anywhere, the event loop included.
    """

    head: http1.Head

    def __init__(self, connection: HTTPConnection, method: str, put_back: PutBack) -> None:
        # not super().__init__(), which makes a cookie jar and more for every response
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
        """Wait for status and headers; raises ReadTimeout after ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        # Yield to the event loop once per request, even if the response has arrived already: a busy
        # keep-alive connection would otherwise starve the others.
        self._wait_readable(deadline)
        while True:
            head = self._take_head()
            if head is not None:
                return head
            self._fill(remaining(deadline))

    def receive(self, timeout: float | None) -> bytes:
        """Return the payload of the next arrival; ``b""`` at the end of the response.

        Raises ReadTimeout after ``timeout`` seconds without an arrival, ConnectionBroken when the
        response breaks off.
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
        """Return the next arrival, for the methods that Exchange inherits (``.content``)."""
        return self.receive(None)

    @property
    def complete(self) -> bool:
        """Whether the whole response has been received."""
        return self._body.done

    def abort(self, reason: str = "") -> None:
        """Shut the connection down at once: whoever reads from it gets ConnectionBroken.

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
    #: Whether the gateway aborted the exchange, and the reason to give to a client that is still
    #: connected.
    aborted = False
    abort_reason = ""
    #: Called once, when the exchange releases its connection.
    on_close: Callable[[Exchange], None] | None = None

    def _take_head(self) -> http1.Head | None:
        """Parse the head once the buffer holds all of it, skipping interim (1xx) heads."""
        while True:
            end, skip = _head_end(self._buffer)
            if end < 0:
                if len(self._buffer) > http1.MAX_HEAD_BYTES:
                    raise ConnectionBroken("the head of the response is too large")
                return None
            try:
                head = http1.parse_head(self._buffer[:end])
                self._buffer = self._buffer[end + skip :]
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
            self._reusable = head.keep_alive
            return head

    def _feed(self, data: bytes) -> bytes:
        try:
            return self._body.feed(data)
        except http1.Malformed as fault:
            raise ConnectionBroken(str(fault)) from None

    def _fill(self, timeout: float | None) -> None:
        """Read what has arrived, waiting up to ``timeout`` seconds for something."""
        self._socket.settimeout(timeout)
        try:
            data = self._socket.recv(READ_BYTES)
        except TimeoutError:
            raise ReadTimeout from None
        except OSError as error:
            raise _broken(error) from None
        if data:
            self._buffer += data
            return
        self._ended()

    def _ended(self) -> None:
        try:
            if not hasattr(self, "head"):
                raise ConnectionBroken("the connection closed before a response arrived")
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


def _head_end(buffer: bytes) -> tuple[int, int]:
    """Return where the head ends (-1: not yet) and the length of the line ends that end it."""
    end = buffer.find(b"\r\n\r\n")
    if end >= 0:
        return end, 4
    return buffer.find(b"\n\n"), 2


def _broken(error: OSError) -> ConnectionBroken:
    return ConnectionBroken(error.strerror or "the connection failed")
