"""Reads from a client's connection: bytes, request heads and request bodies."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import gevent

from gateway.clock import remaining
from gateway.lmstudio import TOKEN
from gateway.serving.parsing import (
    MAX_FIELDS,
    MAX_HEAD,
    MAX_LINE,
    SINGLE,
    RequestRejected,
    check_first_line,
    header_field,
)

#: Seconds within which each piece of a request body must arrive, however slow the client is.
BODY_TIMEOUT = 30.0
#: Bytes of an unread body that are read and discarded to keep the connection alive.
MAX_UNREAD = 65536
#: Bytes of one read.
READ_BYTES = 65536
#: Bytes of a connection after which the other connections get their turn.
YIELD_BYTES = 65536
#: A chunked body takes at most this many times its payload on the wire, and MAX_FRAMING bytes more.
MAX_FRAMING_RATIO = 4
MAX_FRAMING = 65536
_CR = 0x0D
_CHUNK = re.compile(
    rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[ \t]*"
    + TOKEN
    + rb"(?:=(?:"
    + TOKEN
    + rb'|"[\t !#-\[\]-~\x80-\xff]*"))?)*'
)
#: Fields that a trailer must not carry (RFC 9110 §6.5.1).
_NO_TRAILER = SINGLE | {"HTTP_TRAILER", "HTTP_AUTHORIZATION", "HTTP_TE"}


class ConnectionEnded(Exception):
    """The client has closed its connection."""


class RequestReader:
    """Buffers what a client has sent, and takes heads, lines and bytes from it.

    Costs time linear in the bytes, in however many pieces they arrive: each arrival is appended,
    only what is new is searched, and what is taken advances a position.
    """

    def __init__(self, sock: Any) -> None:
        self._socket = sock
        self._buffer = bytearray()
        #: The position of the first byte that has not been taken.
        self._start = 0
        #: Bytes received since the last :meth:`_receive` that let other greenlets run.
        self._unyielded = 0

    @property
    def pending(self) -> bool:
        """Whether more has arrived than has been read, as with pipelined requests."""
        return len(self._buffer) > self._start

    def head(self, timeout: float) -> bytes:
        """Read a request's head, without the empty line that ends it.

        Raises RequestRejected as soon as the bytes can't become a head, ConnectionEnded if the
        client closes the connection, TimeoutError after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        self._skip_empty_lines(deadline)
        searched = 0  # bytes of the head that do not hold the beginning of its end
        has_line = False
        while (end := self._buffer.find(b"\r\n\r\n", self._start + searched)) < 0:
            has_line = has_line or self._check_first_line(searched)
            arrived = len(self._buffer) - self._start
            if arrived > MAX_HEAD:
                break
            searched = max(0, arrived - 3)
            self._more(deadline)
        if end < 0 or end - self._start > MAX_HEAD:
            raise RequestRejected("The request's head is too large.", status=431)
        return self._take(end, 4)

    def line(self, deadline: float) -> bytes:
        """Read a line of a chunked body's framing, without its CRLF.

        ``deadline`` is a time.monotonic(). Raises as :meth:`head` does.
        """
        searched = 0
        while (end := self._buffer.find(b"\r\n", self._start + searched)) < 0:
            arrived = len(self._buffer) - self._start
            if arrived > MAX_LINE or self._buffer.find(b"\n", self._start + searched) >= 0:
                raise RequestRejected(
                    "A line of the chunked body is too long or ends with a bare LF."
                )
            searched = max(0, arrived - 1)
            self._more(deadline)
        if end - self._start > MAX_LINE:
            raise RequestRejected("A line of the chunked body is too long or ends with a bare LF.")
        line = self._take(end, 2)
        if b"\n" in line or b"\r" in line:
            raise RequestRejected("A line of the chunked body contains a bare CR or LF.")
        return line

    def read(self, size: int, deadline: float) -> bytes:
        """Read exactly ``size`` bytes. Raises ConnectionEnded or TimeoutError if fewer arrive."""
        data = self._take(min(self._start + size, len(self._buffer)), 0)
        missing = size - len(data)
        if not missing:
            return data
        pieces = [data]
        while missing:
            pieces.append(self._receive(min(missing, READ_BYTES), deadline))
            missing -= len(pieces[-1])
        return b"".join(pieces)

    def _skip_empty_lines(self, deadline: float) -> None:
        """Skip the empty lines before a request, which RFC 9112 §2.2 tolerates."""
        skipped = 0
        while True:
            arrived = len(self._buffer) - self._start
            if arrived == 0 or (arrived == 1 and self._buffer[self._start] == _CR):
                self._more(deadline)
            elif self._buffer.startswith(b"\r\n", self._start):
                self._start += 2
                skipped += 2
                if skipped > MAX_HEAD:
                    raise RequestRejected("The request's head is too large.", status=431)
            else:
                return

    def _check_first_line(self, searched: int) -> bool:
        """Reject a head that can't become one without waiting for the rest of it.

        Its first ``searched`` bytes hold no LF. Returns whether its first line has arrived.
        """
        end = self._buffer.find(b"\n", self._start + searched)
        arrived = len(self._buffer) - self._start
        if end >= 0 or not searched or arrived > MAX_LINE:
            stop = end if end >= 0 else self._start + MAX_LINE + 2
            check_first_line(bytes(self._buffer[self._start : stop]), complete=end >= 0)
        return end >= 0

    def _take(self, end: int, separator: int) -> bytes:
        """Take the bytes before a position, and drop a separator of so many bytes behind them."""
        data = bytes(memoryview(self._buffer)[self._start : end])
        self._start = end + separator
        if self._start == len(self._buffer):
            self._buffer.clear()
            self._start = 0
        return data

    def _more(self, deadline: float) -> None:
        data = self._receive(READ_BYTES, deadline)
        if self._start > READ_BYTES:
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    def _receive(self, size: int, deadline: float) -> bytes:
        if self._unyielded >= YIELD_BYTES:
            # receiving does not wait, and so not yield, as long as the client is fast enough
            self._unyielded = 0
            gevent.sleep(0)
        self._socket.settimeout(remaining(deadline))
        data: bytes = self._socket.recv(size)
        if not data:
            raise ConnectionEnded
        self._unyielded += len(data)
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
        #: Bytes read: of the framing, and of the data within it.
        self._overhead = self._payload = 0
        #: Whether the whole body has been read.
        self.done = length == 0
        #: Whether a read failed, after which nothing on the connection can be trusted.
        self.broken = False
        #: Why the body was rejected, if it was.
        self.rejected: RequestRejected | None = None

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
        except RequestRejected as error:
            self.broken, self.rejected = True, error
            raise
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
            self._payload += wanted
            if missing is None:
                deadline = time.monotonic() + BODY_TIMEOUT
            else:
                missing -= wanted
            if not self._left:
                self._end_data(deadline)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _begin_chunk(self, deadline: float) -> None:
        found = _CHUNK.fullmatch(self._framing(deadline))
        if found is None:
            raise RequestRejected("A chunk of the body has a malformed size.")
        self._left = int(found[1], 16)
        if self._left:
            return
        for _ in range(MAX_FIELDS):
            trailer = self._framing(deadline)
            if not trailer:
                self.done = True
                return
            if header_field(trailer)[0] in _NO_TRAILER:
                raise RequestRejected("The body has a trailer field that is not allowed.")
        raise RequestRejected("The body has too many trailers.")

    def _framing(self, deadline: float) -> bytes:
        """Read a line of the framing, within its limit."""
        line = self._reader.line(deadline)
        self._overhead += len(line) + 2
        if self._overhead > (MAX_FRAMING_RATIO - 1) * self._payload + MAX_FRAMING:
            raise RequestRejected(
                "The chunks of the body are too small: their framing is larger than "
                f"{MAX_FRAMING_RATIO - 1} times the data and {MAX_FRAMING} bytes."
            )
        return line

    def _end_data(self, deadline: float) -> None:
        if not self._chunked:
            self.done = True
            return
        self._overhead += 2
        if self._reader.read(2, deadline) != b"\r\n":
            raise RequestRejected("A chunk of the body is not as long as its size says.")
