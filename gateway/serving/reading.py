"""Reads from a client's connection: bytes, request heads and request bodies."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from gateway.clock import remaining
from gateway.lmstudio import TOKEN
from gateway.serving.parsing import (
    MAX_FIELDS,
    MAX_HEAD,
    MAX_LINE,
    SINGLE,
    RequestRejected,
    check_partial_head,
    header_field,
)

#: Seconds within which each piece of a request body must arrive, however slow the client is.
BODY_TIMEOUT = 30.0
#: Bytes of an unread body that are read and discarded to keep the connection alive.
MAX_UNREAD = 65536
#: Bytes of one read.
READ_BYTES = 65536
_CHUNK = re.compile(
    rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[ \t]*" + TOKEN + rb"(?:=(?:" + TOKEN + rb'|"[^"\\]*"))?)*'
)
#: Fields that a trailer must not carry (RFC 9110 §6.5.1).
_NO_TRAILER = SINGLE | {"HTTP_TRAILER", "HTTP_AUTHORIZATION", "HTTP_TE"}


class ConnectionEnded(Exception):
    """The client has closed its connection."""


class RequestReader:
    """Buffers what a client has sent, and takes heads, lines and bytes from it."""

    def __init__(self, sock: Any) -> None:
        self._socket = sock
        self._buffer = b""

    @property
    def pending(self) -> bool:
        """Whether more has arrived than has been read, as with pipelined requests."""
        return bool(self._buffer)

    def head(self, timeout: float) -> bytes:
        """Read a request's head, without the empty line that ends it.

        Raises RequestRejected as soon as the bytes can't become a head, ConnectionEnded if the
        client closes the connection, TimeoutError after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        end = -1
        while True:
            if self._buffer:
                self._buffer = self._buffer.removeprefix(b"\r\n")
                end = self._buffer.find(b"\r\n\r\n")
                if end >= 0:
                    break
                if self._buffer not in (b"", b"\r"):
                    check_partial_head(self._buffer)
            self._more(deadline)
        if end > MAX_HEAD:
            raise RequestRejected("The request's head is too large.", status=431)
        head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
        return head

    def line(self, deadline: float) -> bytes:
        """Read a line of a chunked body's framing, without its CRLF.

        ``deadline`` is a time.monotonic(). Raises as :meth:`head` does.
        """
        while True:
            end = self._buffer.find(b"\r\n")
            if end >= 0:
                line, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
                if b"\n" in line or b"\r" in line:
                    raise RequestRejected("A line of the chunked body contains a bare CR or LF.")
                return line
            if len(self._buffer) > MAX_LINE or b"\n" in self._buffer:
                raise RequestRejected(
                    "A line of the chunked body is too long or ends with a bare LF."
                )
            self._more(deadline)

    def read(self, size: int, deadline: float) -> bytes:
        """Read exactly ``size`` bytes. Raises ConnectionEnded or TimeoutError if fewer arrive."""
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        missing = size - len(data)
        if not missing:
            return data
        pieces = [data]
        while missing:
            pieces.append(self._receive(min(missing, READ_BYTES), deadline))
            missing -= len(pieces[-1])
        return b"".join(pieces)

    def _more(self, deadline: float) -> None:
        data = self._receive(READ_BYTES, deadline)
        self._buffer = self._buffer + data if self._buffer else data

    def _receive(self, size: int, deadline: float) -> bytes:
        self._socket.settimeout(remaining(deadline))
        data: bytes = self._socket.recv(size)
        if not data:
            raise ConnectionEnded
        return data


class RequestBody:
    """A request's body, as ``wsgi.input``.

    Of a file's methods it only has ``read``, which is what the gateway and werkzeug use. ``length``
    is None for a chunked body. ``send_continue`` sends ``100 Continue``, for which the client waits
    before it sends the body.
    """

    def __init__(
        self,
        reader: RequestReader,
        length: int | None,
        send_continue: Callable[[], None] | None = None,
    ) -> None:
        self._reader = reader
        #: Unread bytes, of the current chunk if the body is chunked.
        self._left = length or 0
        self._chunked = length is None
        self._send_continue = send_continue
        #: Whether the whole body has been read.
        self.done = length == 0
        #: Whether a read failed, after which nothing on the connection can be trusted.
        self.broken = False

    def read(self, size: int | None = None) -> bytes:
        """Read ``size`` bytes, fewer only at the end of the body; without a size, all of them.

        Raises TimeoutError, ConnectionEnded (the client disconnected) or RequestRejected (the
        chunks are malformed).
        """
        if self.done:
            return b""
        if self._send_continue is not None:
            send_continue, self._send_continue = self._send_continue, None
            send_continue()
        if self.broken:
            raise RequestRejected("The request body is malformed.")
        try:
            return self._pieces(size if size is not None and size >= 0 else None)
        except BaseException:
            self.broken = True
            raise

    def can_discard(self) -> bool:
        """Whether the rest of the body is short and on its way, so it can be read and discarded."""
        waited_for = self._send_continue is not None
        return not (waited_for or self.broken or self._chunked) and self._left <= MAX_UNREAD

    def _pieces(self, size: int | None) -> bytes:
        if not self._chunked and (size is None or size >= self._left):
            size = self._left
        pieces = []
        missing = size
        deadline = time.monotonic() + BODY_TIMEOUT
        while missing != 0 and not self.done:
            if not self._left:
                self._begin_chunk(deadline)
                continue
            wanted = min(self._left, READ_BYTES) if missing is None else min(self._left, missing)
            pieces.append(self._reader.read(wanted, deadline))
            self._left -= wanted
            if missing is None:
                deadline = time.monotonic() + BODY_TIMEOUT
            else:
                missing -= wanted
            if not self._left:
                self._end_data(deadline)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _begin_chunk(self, deadline: float) -> None:
        found = _CHUNK.fullmatch(self._reader.line(deadline))
        if found is None:
            raise RequestRejected("A chunk of the body has a malformed size.")
        self._left = int(found[1], 16)
        if self._left:
            return
        for _ in range(MAX_FIELDS):
            trailer = self._reader.line(deadline)
            if not trailer:
                self.done = True
                return
            if header_field(trailer)[0] in _NO_TRAILER:
                raise RequestRejected("The body has a trailer field that is not allowed.")
        raise RequestRejected("The body has too many trailers.")

    def _end_data(self, deadline: float) -> None:
        if not self._chunked:
            self.done = True
        elif self._reader.read(2, deadline) != b"\r\n":
            raise RequestRejected("A chunk of the body is not as long as its size says.")
