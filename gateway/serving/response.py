"""Writing a WSGI application's response to a client's connection."""

from __future__ import annotations

import logging
import time
from email.utils import formatdate
from functools import lru_cache
from typing import Any

from gevent import GreenletExit

from gateway import errors
from gateway.errors import GatewayError, Headers
from gateway.request import REQUEST_ID, name_request
from gateway.serving.reading import READ_BYTES, ConnectionEnded, RequestBody

logger = logging.getLogger(__name__)

Environ = dict[str, Any]


class Response:
    """One answer on its way out."""

    def __init__(self, sock: Any, environ: Environ, body: RequestBody, keep: bool) -> None:
        self._socket = sock
        self._environ = environ
        self._body = body
        #: Whether the connection can be used again.
        self.keep = keep
        self._head = b""
        self._begun = False
        self._chunked = False
        self._bodiless = environ["REQUEST_METHOD"] == "HEAD"

    def send(self, application: Any) -> None:
        """Run the application and send what it gives, each piece when it comes; an empty one sends
        the head. One that fails after that is cut off, so that it can't be taken for complete."""
        result = None
        try:
            result = application(self._environ, self._start)
            for piece in result:
                self.write(piece)
            if not self._begun:
                self.write(b"")
            if self._chunked:
                self._socket.sendall(b"0\r\n\r\n")
        except (ConnectionEnded, OSError, GreenletExit):
            raise
        except Exception as fault:
            logger.error("the application failed", exc_info=fault)
            if not self._begun:
                error = GatewayError("The gateway failed; its log says more.")
                self._socket.sendall(final_response(error, self._environ))
            raise ConnectionEnded from None
        finally:
            close = getattr(result, "close", None)
            if close is not None:
                close()

    def write(self, piece: bytes) -> None:
        """Send a piece of the body, with the head in front of the first."""
        if self._bodiless:
            piece = b""
        elif self._chunked and piece:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        if not self._begun:
            self._begun = True
            self._socket.settimeout(None)
            if self._chunked or len(piece) <= READ_BYTES:
                piece = self._head + piece
            else:
                self._socket.sendall(self._head)
        if piece:
            self._socket.sendall(piece)

    def _start(self, status: str, headers: Headers, exc_info: Any = None) -> Any:
        """WSGI's ``start_response``."""
        if exc_info is not None and self._begun:
            raise exc_info[1]
        names = {name.lower() for name, _ in headers}
        more: Headers = []
        if status[:3] in ("204", "304"):
            self._bodiless = True
        elif "content-length" not in names and not self._bodiless:
            self._chunked = self._environ["SERVER_PROTOCOL"] == "HTTP/1.1"
            self.keep = self.keep and self._chunked
            if self._chunked:
                more.append(("Transfer-Encoding", "chunked"))
        if status[:3] == "499" or not (self._body.done or self._body.spare()):
            self.keep = False  # the client has left; or what follows can't be told from the body
        if not self.keep:
            more.append(("Connection", "close"))
        elif self._environ["SERVER_PROTOCOL"] == "HTTP/1.0":
            more.append(("Connection", "keep-alive"))
        self._head = _head(status, headers + more)
        return self.write


def final_response(error: GatewayError, environ: Environ) -> bytes:
    """An error, as the answer that ends a connection."""
    path = environ.get("PATH_INFO", "/v1/")  # else in the dialect of most clients
    request_id = environ.get(REQUEST_ID) or name_request(environ)
    line, headers, body = errors.response(error, path, request_id)
    headers += [("Connection", "close"), ("X-Request-Id", request_id)]
    return _head(line, headers) + body


def _head(status: str, headers: Headers) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Server: lmstudio-gateway", f"Date: {_date(int(time.time()))}"]
    lines += [f"{name}: {value}" for name, value in headers]
    head = "\r\n".join(lines)
    if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1:
        raise ValueError("a header of the answer holds a line break")
    return f"{head}\r\n\r\n".encode("latin-1")


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)
