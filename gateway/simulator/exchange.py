"""One HTTP exchange: the request, the raw writes of its answer, the watch on its client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

import gevent

from gateway.simulator.journal import Record

if TYPE_CHECKING:
    from gateway.simulator.server import Handler


class ClientGone(gevent.GreenletExit):  # type: ignore[misc]  # gevent has no types here
    """Ends the greenlet of an exchange whose client has left."""


class Reset(Exception):
    """Asks for the connection to be reset, once nothing reads from it any more."""


class Exchange:
    """A request with its body already read, and the way back to its client."""

    def __init__(self, handler: Handler, record: Record, body: bytes) -> None:
        self.method = handler.command
        self.target = handler.path
        self.path = handler.path.partition("?")[0]
        self.body = body
        self.record = record
        self._handler = handler
        self._chunked = False

    def header(self, name: str) -> str | None:
        """Return a request header by its name in lower case."""
        value: str | None = self._handler.headers.get(name)
        return value

    def send_head(self, status: int, headers: dict[str, str], length: int | None) -> None:
        """Send the response head; ``length`` ``None`` means chunks (or, in HTTP/1.0, until close).

        A ``Connection: close`` among the headers makes the answer end with the connection.
        """
        closing = headers.get("Connection") == "close"
        if length is not None:
            headers = headers | {"Content-Length": str(length)}
        elif self._handler.request_version == "HTTP/1.1" and not closing:
            headers = headers | {"Transfer-Encoding": "chunked"}
            self._chunked = True
        else:
            closing = True
        self._handler.close_connection = self._handler.close_connection or closing
        self.record.status, self.record.sent_headers = status, list(headers.items())
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.write_raw(("\r\n".join(lines) + "\r\n\r\n").encode())

    def send(self, payload: bytes) -> None:
        """Send body bytes in one write; in a chunked answer they are one chunk."""
        self.record.keep_sent(payload)
        self.write_raw(b"%x\r\n%b\r\n" % (len(payload), payload) if self._chunked else payload)

    def finish(self) -> None:
        """End the body."""
        if self._chunked:
            self.write_raw(b"0\r\n\r\n")

    def write_raw(self, data: bytes) -> None:
        """Write to the socket as it is."""
        self._handler.socket.sendall(data)

    def hang_up(self) -> None:
        """End the connection after what was sent, in order."""
        self._handler.close_connection = True

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise :class:`ClientGone` in the block as soon as the client closes its connection."""
        watcher = gevent.spawn(self._watch, gevent.getcurrent())
        try:
            yield
        finally:
            watcher.kill()

    def _watch(self, owner: gevent.Greenlet[..., object]) -> None:
        try:
            # A peek leaves a pipelined request in the buffer, and unlike MSG_PEEK works with TLS.
            gone = not self._handler.rfile.peek(1)
        except (OSError, ValueError):
            gone = True
        if gone:
            owner.kill(ClientGone, block=False)
