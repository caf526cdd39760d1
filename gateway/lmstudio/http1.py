"""Parses HTTP/1.1 responses: heads and the framing of bodies (RFC 9112).

The parser is incremental and strict. Bytes go in as they arrive and their payload comes out at
once, and anything that a server must not send raises :class:`Malformed`. Streams pass without delay
because this parser, unlike those of the libraries, never waits for a whole chunk (see README.rst,
Speed).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

MAX_HEAD_BYTES = 256 * 1024
#: Bytes of the status line or of one header line.
MAX_LINE_BYTES = 64 * 1024
MAX_CHUNK_LINE_BYTES = 4096
#: Bytes of all trailers of a chunked body.
MAX_TRAILER_BYTES = 64 * 1024
#: Header lines up to this length are cached once they have been parsed.
_CACHED_LINE_BYTES = 256

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?")
#: A header's name or a method, of requests and responses (RFC 9110, section 5.6.2).
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_NAME = re.compile(TOKEN)
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?")
_LENGTH = re.compile(r"[0-9]{1,18}")


class Malformed(Exception):
    """The peer's bytes are not valid HTTP/1.1."""


@dataclass
class Head:
    """Status and headers of a response; names keep their case."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    http10: bool
    #: Whether the headers contradict each other about the length of the body, so that the
    #: connection must not carry another exchange.
    ambiguous: bool = False

    def get(self, name: str) -> str | None:
        """Return the values of a header (its name in lower case) joined with commas, or None."""
        found = [value for header, value in self.headers if header.lower() == name]
        return ", ".join(found) if found else None

    @property
    def keep_alive(self) -> bool:
        """Whether the connection may carry another exchange."""
        if self.ambiguous:
            return False
        connection = (self.get("connection") or "").lower()
        return "keep-alive" in connection if self.http10 else "close" not in connection

    @property
    def content_coding(self) -> str | None:
        """The coding of the body (``gzip``, say) in lower case; None if it has none."""
        coding = (self.get("content-encoding") or "").strip().lower()
        return None if coding in ("", "identity") else coding


def parse_head(block: bytes) -> Head:
    """Parse a head, given without the empty line that ends it. Raises Malformed."""
    first, *lines = block.replace(b"\r\n", b"\n").split(b"\n")
    match = _STATUS_LINE.fullmatch(first)
    if match is None:
        raise Malformed("bad status line")
    headers = [
        _cached_header(line) if len(line) <= _CACHED_LINE_BYTES else _header(line) for line in lines
    ]
    reason = (match[3] or b"").decode("latin-1").strip()
    return Head(int(match[2]), reason, headers, http10=match[1] == b"0")


@lru_cache(maxsize=1024)
def _cached_header(line: bytes) -> tuple[str, str]:
    # a server repeats most lines in every response
    return _header(line)


def _header(line: bytes) -> tuple[str, str]:
    header = header_line(line) if len(line) <= MAX_LINE_BYTES else None
    if header is None:
        raise Malformed("bad header line")
    return header


def header_line(line: bytes) -> tuple[str, str] | None:
    """Split a header line into its name and its value, None if it is malformed (RFC 9110, section
    5.5).

    Takes time linear in the line's length, however hostile the line is.
    """
    name, colon, value = line.partition(b":")
    value = value.strip(b" \t")
    if not colon or not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
        return None
    return name.decode("ascii"), value.decode("latin-1")


class Body:
    """The framing of one body. ``feed`` returns the payload in an arrival, perhaps none of it."""

    #: Whether the body is complete.
    done = False
    #: Whether bytes followed the end. They are dropped, and the connection can't be used again.
    excess = False

    def feed(self, data: bytes) -> bytes:
        raise NotImplementedError

    def end(self) -> None:
        """Note that the peer closed the connection; raises Malformed if the body is incomplete."""
        if not self.done:
            raise Malformed("the connection closed in the middle of the body")


class NoBody(Body):
    """The absent body of a response to HEAD, or of a 204 or 304."""

    done = True

    def feed(self, data: bytes) -> bytes:
        self.excess = True
        return b""


class UntilClose(Body):
    """A body without a length, which ends with the connection."""

    def feed(self, data: bytes) -> bytes:
        return data

    def end(self) -> None:
        self.done = True


class Sized(Body):
    """A body with a Content-Length."""

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = length == 0

    def feed(self, data: bytes) -> bytes:
        if len(data) > self._left:
            self.excess = True
            data = data[: self._left]
        self._left -= len(data)
        self.done = self._left == 0
        return data


class Chunked(Body):
    """A body with ``Transfer-Encoding: chunked``. Partial chunks are passed on at once."""

    def __init__(self) -> None:
        self._left = 0  # bytes of the current chunk that have not arrived
        self._rest = b""  # an incomplete line
        self._after_data = False  # the next line is the empty one after a chunk
        self._in_trailer = False
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> bytes:
        payload = []
        if self._rest:
            data, self._rest = self._rest + data, b""
        position, end = 0, len(data)
        while position < end:
            if self._left:
                piece = data[position : position + self._left]
                payload.append(piece)
                position += len(piece)
                self._left -= len(piece)
                self._after_data = not self._left
                continue
            if self.done:
                self.excess = True
                break
            newline = data.find(b"\n", position)
            if newline < 0:
                self._keep(data[position:])
                break
            self._read_line(data[position:newline].removesuffix(b"\r"))
            position = newline + 1
        return payload[0] if len(payload) == 1 else b"".join(payload)

    def _keep(self, rest: bytes) -> None:
        if len(rest) > MAX_CHUNK_LINE_BYTES:
            raise Malformed("bad chunk line")
        self._rest = rest

    def _read_line(self, line: bytes) -> None:
        if self._after_data:
            if line:
                raise Malformed("bad end of chunk")
            self._after_data = False
        elif self._in_trailer:
            # dropped: no client was promised trailers
            self._trailer_bytes += len(line)
            if self._trailer_bytes > MAX_TRAILER_BYTES:
                raise Malformed("the trailers are too large")
            self.done = not line
        else:
            size = _CHUNK_SIZE.fullmatch(line)
            if size is None:
                raise Malformed("bad chunk size")
            self._left = int(size[1], 16)
            self._in_trailer = self._left == 0


def body_of(head: Head, method: str) -> Body:
    """Return the framing of a response's body (RFC 9112, section 6.3). Raises Malformed.

    Leaves in the head the one ``Content-Length`` that a client may be given: equal ones become one,
    and beside a transfer coding, which wins, there is none.
    """
    length = _settle_length(head)
    if method == "HEAD" or head.status in (204, 304):
        return NoBody()
    coding = head.get("transfer-encoding")
    if coding is None:
        return UntilClose() if length is None else Sized(int(length))
    if coding.strip().lower() != "chunked":
        raise Malformed("unknown transfer coding")
    head.ambiguous = head.ambiguous or head.http10  # HTTP/1.0 has no transfer codings
    return Chunked()


def _settle_length(head: Head) -> str | None:
    """Return the value of ``Content-Length``, None if there is none, after removing from the head
    what must not reach the client.

    Raises Malformed unless all values are the same number.
    """
    lines = [pair for pair in head.headers if pair[0].lower() == "content-length"]
    if not lines:
        return None
    values = {value.strip(" \t") for _, line in lines for value in line.split(",")}
    length = values.pop()
    if values or not _LENGTH.fullmatch(length):
        raise Malformed("bad Content-Length")
    head.ambiguous = head.get("transfer-encoding") is not None
    kept = [] if head.ambiguous or head.status == 204 else [(lines[0][0], length)]
    if kept != lines:
        head.headers = [pair for pair in head.headers if pair not in lines] + kept
    return length
