"""A client that sends raw bytes and parses the responses strictly."""

from __future__ import annotations

import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass

#: Seconds within which a response must arrive.
DEADLINE = 40.0
#: Seconds of silence that show that there is no further response.
QUIET = 0.06
#: Seconds of silence that show that the server waits for the client.
WAITING = 0.5
#: Seconds for which a connection must stay open after its last response.
STAYING = 0.1
_STATUS_LINE = re.compile(rb"HTTP/1\.\d (\d{3})(?: [^\r\n]*)?")


@dataclass
class Response:
    """A response; interim ones (1xx) count too."""

    status: str
    head: bytes
    body: bytes

    @property
    def raw(self) -> bytes:
        return self.head + b"\r\n\r\n" + self.body

    def header(self, name: str) -> str | None:
        """The value of a header, None if it is missing."""
        found = re.search(rb"(?im)^" + name.encode() + rb":[ \t]*(.*?)\r?$", self.head)
        return found[1].decode("latin-1") if found else None


class Client:
    """One connection. It can't send HEAD, whose responses have no body."""

    def __init__(self, port: int, timeout: float = DEADLINE) -> None:
        self.timeout = timeout
        self.sock = socket.create_connection(("127.0.0.1", port), timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self._ended = False

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        """Send bytes. A server that has already closed the connection is no error."""
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            self._ended = False  # a response may have arrived nevertheless

    def finish(self) -> None:
        """Close this half of the connection. Responses can still be read."""
        with suppress(OSError):  # the server may have closed the connection already
            self.sock.shutdown(socket.SHUT_WR)

    def read(self) -> Response | None:
        """The next response, None if the connection closes instead. Fails at the deadline."""
        deadline = time.monotonic() + self.timeout
        while b"\r\n\r\n" not in self._buffer:
            if not self._more(deadline):
                assert not self._buffer, f"incomplete: {self._buffer[:300]!r}"
                return None
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        line = _STATUS_LINE.fullmatch(head.partition(b"\r\n")[0])
        assert line, f"no status line: {head[:200]!r}"
        response = Response(line[1].decode(), head, b"")
        if response.status not in ("100", "204", "304"):
            response.body = self._body(response, deadline)
        return response

    def final(self) -> Response:
        """The next response that is not an interim one."""
        while True:
            response = self.read()
            assert response is not None, "the connection closed without a response"
            if response.status != "100":
                return response

    def is_silent(self, seconds: float) -> bool:
        """Whether nothing arrives for so long, or the connection closes."""
        if self._buffer:
            return False
        try:
            self._more(time.monotonic() + seconds)
        except TimeoutError:
            return True
        return not self._buffer

    def headless(self) -> Response:
        """Everything up to the end of the connection, as the body of a response without a head."""
        body = self._rest(time.monotonic() + self.timeout)
        assert body, "the connection closed without a response"
        assert not body.startswith(b"HTTP/"), body
        return Response("", b"", body)

    def is_closed(self, within: float | None = None) -> bool:
        """Whether the server closes the connection, within the timeout unless another is given."""
        try:
            return not self._more(time.monotonic() + (within or self.timeout))
        except TimeoutError:
            return False

    def _body(self, response: Response, deadline: float) -> bytes:
        length = response.header("Content-Length")
        if (response.header("Transfer-Encoding") or "").lower() == "chunked":
            assert length is None
            return self._chunks(deadline)
        if length is not None:
            return self._take(int(length), deadline)
        return self._rest(deadline)

    def _rest(self, deadline: float) -> bytes:
        while self._more(deadline):
            pass
        body, self._buffer = self._buffer, b""
        return body

    def _chunks(self, deadline: float) -> bytes:
        pieces = []
        while True:
            while b"\r\n" not in self._buffer:
                assert self._more(deadline), "incomplete chunk size"
            size, _, self._buffer = self._buffer.partition(b"\r\n")
            piece = self._take(int(size, 16) + 2, deadline)
            assert piece.endswith(b"\r\n")
            if len(piece) == 2:
                return b"".join(pieces)
            pieces.append(piece[:-2])

    def _take(self, count: int, deadline: float) -> bytes:
        while len(self._buffer) < count:
            assert self._more(deadline), "incomplete body"
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _more(self, deadline: float) -> bool:
        if self._ended:
            return False
        self.sock.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            data = self.sock.recv(65536)
        except ConnectionResetError:
            data = b""
        self._buffer += data
        self._ended = not data
        return bool(data)
