"""Writes a WSGI application's response to a client's connection."""

from __future__ import annotations

import logging
import time
from email.utils import formatdate
from functools import lru_cache
from typing import Any

from gevent import GreenletExit

from gateway import errors
from gateway.errors import GatewayError, Headers, InternalError
from gateway.request import DELIVERED, request_id_of
from gateway.serving.reading import READ_BYTES, ConnectionEnded, RequestBody

logger = logging.getLogger(__name__)

Environ = dict[str, Any]

#: Seconds for which a client may take no byte of its response before its connection is closed.
SEND_TIMEOUT = 60.0


class ClientStalled(TimeoutError):
    """The client has not read its response for SEND_TIMEOUT seconds."""


class Response:
    """One response of the application, which :meth:`send` runs.

    ``body`` is the request's; ``keep_alive`` says whether client and server want to use the
    connection again.
    """

    def __init__(self, sock: Any, environ: Environ, body: RequestBody, keep_alive: bool) -> None:
        self._socket = sock
        self._environ = environ
        self._body = body
        #: Whether the connection can carry another request.
        self.keep_alive = keep_alive
        self._head = b""
        self._head_sent = False
        self._chunked = False
        self._has_body = environ["REQUEST_METHOD"] != "HEAD"

    def send(self, application: Any) -> None:
        """Run the application and send each piece of its body at once; an empty one sends the head.

        If the application fails before the head was sent, the client gets a 500. If it fails later,
        the response is cut off, so that no client mistakes it for a complete one. Raises
        ConnectionEnded in both cases, ClientStalled, and whatever the socket raises when the client
        has disconnected.
        """
        result = None
        try:
            result = application(self._environ, self._start)
            for piece in result:
                self.write(piece)
            if not self._head_sent:
                self.write(b"")
            if self._chunked:
                send_all(self._socket, b"0\r\n\r\n")
            self._environ[DELIVERED] = True
        except (ConnectionEnded, OSError, GreenletExit):
            raise
        except Exception as fault:
            logger.error("the WSGI application failed", exc_info=fault)
            if not self._head_sent:
                send_all(self._socket, final_response(InternalError(), self._environ))
            raise ConnectionEnded from None
        finally:
            close = getattr(result, "close", None)
            if close is not None:
                close()

    def write(self, piece: bytes) -> None:
        """Send a piece of the body; the first one goes out together with the head."""
        if not self._has_body:
            piece = b""
        elif self._chunked and piece:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        if not self._head_sent:
            self._head_sent = True
            if self._chunked or len(piece) <= READ_BYTES:
                piece = self._head + piece
            else:
                send_all(self._socket, self._head)
        if piece:
            send_all(self._socket, piece)

    def _start(self, status: str, headers: Headers, exc_info: Any = None) -> Any:
        """WSGI's ``start_response``."""
        if exc_info is not None and self._head_sent:
            raise exc_info[1]
        names = {name.lower() for name, _ in headers}
        more: Headers = []
        if status[:3] in ("204", "304"):
            self._has_body = False
        elif "content-length" not in names and self._has_body:
            self._chunked = self._environ["SERVER_PROTOCOL"] == "HTTP/1.1"
            self.keep_alive = self.keep_alive and self._chunked
            if self._chunked:
                more.append(("Transfer-Encoding", "chunked"))
        # the client has disconnected, or the next request can't be told apart from the unread body
        if status[:3] == "499" or not (self._body.done or self._body.can_discard()):
            self.keep_alive = False
        if not self.keep_alive:
            more.append(("Connection", "close"))
        elif self._environ["SERVER_PROTOCOL"] == "HTTP/1.0":
            more.append(("Connection", "keep-alive"))
        self._head = _head(status, headers + more)
        return self.write


def send_all(sock: Any, data: bytes) -> None:
    """Send all of ``data``. Raises ClientStalled if the client takes no byte for SEND_TIMEOUT."""
    sock.settimeout(SEND_TIMEOUT)
    try:
        sent = sock.send(data)
        if sent < len(data):
            rest = memoryview(data)[sent:]
            while rest:
                rest = rest[sock.send(rest) :]
    except TimeoutError:
        raise ClientStalled from None


def final_response(error: GatewayError, environ: Environ) -> bytes:
    """A whole response that reports an error and is the last one of its connection."""
    path = environ.get("PATH_INFO", "/v1/")  # without a path: the dialect of most clients
    request_id = request_id_of(environ)
    line, headers, body = errors.response(error, path, request_id)
    headers += [("Connection", "close"), ("X-Request-Id", request_id)]
    return _head(line, headers) + body


def _head(status: str, headers: Headers) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Server: lmstudio-gateway", f"Date: {_date(int(time.time()))}"]
    lines += [f"{name}: {value}" for name, value in headers]
    head = "\r\n".join(lines)
    if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1:
        raise ValueError("a response header contains a line break")
    return f"{head}\r\n\r\n".encode("latin-1")


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)
