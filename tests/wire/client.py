"""A client that sends bytes and takes the answers apart, strictly."""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass

#: Seconds in which an answer must come.
DEADLINE = 40.0
#: Seconds after which nothing more is expected on a connection that stays open.
QUIET = 0.06
#: Seconds of silence that are taken for waiting.
WAITING = 0.5
#: Seconds in which a connection that ends with its answer is closed.
ENDING = 0.1
_STATUS_LINE = re.compile(rb"HTTP/1\.\d (\d{3})(?: [^\r\n]*)?")


@dataclass
class Answer:
    """One answer; interim ones (1xx) are answers too."""

    status: str
    head: bytes
    body: bytes

    @property
    def raw(self) -> bytes:
        return self.head + b"\r\n\r\n" + self.body

    def header(self, name: str) -> str | None:
        """The value of a header, None when there is none."""
        found = re.search(rb"(?im)^" + name.encode() + rb":[ \t]*(.*?)\r?$", self.head)
        return found[1].decode("latin-1") if found else None


class Client:
    """One connection. Not for HEAD."""

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
        """Send; that the server has closed already is no failure."""
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            self._ended = False  # an answer may be there all the same

    def read(self) -> Answer | None:
        """The next answer; None when the connection ends instead. Fails at the deadline."""
        deadline = time.monotonic() + self.timeout
        while b"\r\n\r\n" not in self._buffer:
            if not self._more(deadline):
                assert not self._buffer, f"cut off: {self._buffer[:300]!r}"
                return None
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        line = _STATUS_LINE.fullmatch(head.partition(b"\r\n")[0])
        assert line, f"no status line: {head[:200]!r}"
        answer = Answer(line[1].decode(), head, b"")
        if answer.status not in ("100", "204", "304"):
            answer.body = self._body(answer, deadline)
        return answer

    def final(self) -> Answer:
        """The next answer that is no interim one."""
        while True:
            answer = self.read()
            assert answer is not None, "the connection ended without an answer"
            if answer.status != "100":
                return answer

    def silent(self, seconds: float) -> bool:
        """Whether nothing more comes: the end, or silence for so long."""
        if self._buffer:
            return False
        try:
            self._more(time.monotonic() + seconds)
        except TimeoutError:
            return True
        return not self._buffer

    def headless(self) -> Answer:
        """All until the end, as the body of an answer without a head."""
        body = self._rest(time.monotonic() + self.timeout)
        assert body, "the connection ended without an answer"
        assert not body.startswith(b"HTTP/"), body
        return Answer("", b"", body)

    def ends(self, within: float | None = None) -> bool:
        """Wait for the server to close."""
        try:
            return not self._more(time.monotonic() + (within or self.timeout))
        except TimeoutError:
            return False

    def _body(self, answer: Answer, deadline: float) -> bytes:
        length = answer.header("Content-Length")
        if (answer.header("Transfer-Encoding") or "").lower() == "chunked":
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
                assert self._more(deadline), "cut off in a chunk's size"
            size, _, self._buffer = self._buffer.partition(b"\r\n")
            piece = self._take(int(size, 16) + 2, deadline)
            assert piece.endswith(b"\r\n")
            if len(piece) == 2:
                return b"".join(pieces)
            pieces.append(piece[:-2])

    def _take(self, count: int, deadline: float) -> bytes:
        while len(self._buffer) < count:
            assert self._more(deadline), "cut off in the body"
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
