"""Reading from a client's connection: bytes, heads and request bodies."""

from __future__ import annotations

import re
import time
from typing import Any

from gateway.lmstudio import TOKEN
from gateway.serving.parsing import (
    MAX_FIELDS,
    MAX_HEAD,
    MAX_LINE,
    SINGLE,
    RequestRejected,
    check_beginning,
    header_field,
)

#: Seconds in which each piece of a request body must come: a trickling client is not served.
BODY_TIMEOUT = 30.0
#: How much of a body that nobody wanted is read for the sake of keeping the connection.
MAX_UNREAD = 65536
READ_BYTES = 65536
_CHUNK = re.compile(
    rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[ \t]*" + TOKEN + rb"(?:=(?:" + TOKEN + rb'|"[^"\\]*"))?)*'
)
#: What a trailer may not carry (RFC 9110 §6.5.1).
_NO_TRAILER = SINGLE | {"HTTP_TRAILER", "HTTP_AUTHORIZATION", "HTTP_TE"}


class ConnectionEnded(Exception):
    """The client has closed its connection, or was silent for too long."""


# Reading --------------------------------------------------------------------------------------


class RequestReader:
    """What a client has sent and nobody has taken yet."""

    def __init__(self, sock: Any) -> None:
        self._socket = sock
        self._buffer = b""

    @property
    def pending(self) -> bool:
        """Whether something has come already."""
        return bool(self._buffer)

    def head(self, timeout: float) -> bytes:
        """A request's head without its empty line.

        Raises RequestRejected as soon as the bytes can't become a head, ConnectionEnded when it
        does not arrive.
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
                    check_beginning(self._buffer)
            self._more(deadline)
        if end > MAX_HEAD:
            raise RequestRejected("The request's head is too large.", status=431)
        head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
        return head

    def line(self, deadline: float) -> bytes:
        """A line without its CRLF."""
        while True:
            end = self._buffer.find(b"\r\n")
            if end >= 0:
                line, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
                if b"\n" in line or b"\r" in line:
                    raise RequestRejected("A line of the body's framing holds a bare CR or LF.")
                return line
            if len(self._buffer) > MAX_LINE or b"\n" in self._buffer:
                raise RequestRejected(
                    "A line of the body's framing is too long or ends with a bare LF."
                )
            self._more(deadline)

    def read(self, size: int, deadline: float) -> bytes:
        """So many bytes. Raises ConnectionEnded when fewer come."""
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
        self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
        data: bytes = self._socket.recv(size)
        if not data:
            raise ConnectionEnded
        return data


class RequestBody:
    """A request's body, as ``wsgi.input``. Of a file's methods it has ``read``, which is what the
    gateway (and werkzeug) uses."""

    def __init__(self, received: RequestReader, length: int | None, invite: Any = None) -> None:
        self._received = received
        #: Bytes missing; of the current chunk, when chunks are what comes.
        self._left = length or 0
        self._chunked = length is None
        self._invite = invite
        self.done = length == 0
        #: Whether it broke its framing: what follows on the connection can't be told.
        self.broken = False

    def read(self, size: int | None = None) -> bytes:
        """``size`` bytes, fewer only at the end; all of them without a size.

        Raises TimeoutError, ConnectionEnded (the client left) or RequestRejected (bad framing).
        """
        if self.done:
            return b""
        if self._invite is not None:
            self._invite, invite = None, self._invite
            invite()
        if self.broken:
            raise RequestRejected("The request's body is broken.")
        try:
            return self._pieces(size if size is not None and size >= 0 else None)
        except BaseException:
            self.broken = True
            raise

    def spare(self) -> bool:
        """Whether what was not read is little, is on its way, and can be read away."""
        return not (self._invite or self.broken or self._chunked) and self._left <= MAX_UNREAD

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
            pieces.append(self._received.read(wanted, deadline))
            self._left -= wanted
            if missing is None:
                deadline = time.monotonic() + BODY_TIMEOUT
            else:
                missing -= wanted
            if not self._left:
                self._end_data(deadline)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _begin_chunk(self, deadline: float) -> None:
        found = _CHUNK.fullmatch(self._received.line(deadline))
        if found is None:
            raise RequestRejected("A chunk of the body has no proper size.")
        self._left = int(found[1], 16)
        if self._left:
            return
        for _ in range(MAX_FIELDS):
            trailer = self._received.line(deadline)
            if not trailer:
                self.done = True
                return
            if header_field(trailer)[0] in _NO_TRAILER:
                raise RequestRejected("A trailer of the body may not be one.")
        raise RequestRejected("The body has too many trailers.")

    def _end_data(self, deadline: float) -> None:
        if not self._chunked:
            self.done = True
        elif self._received.read(2, deadline) != b"\r\n":
            raise RequestRejected("A chunk of the body is not as long as it says.")
