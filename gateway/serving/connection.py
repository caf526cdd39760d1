"""One client's connection: read a request, call the application, write the response (RFC 9112).

The same code serves under gunicorn's gevent worker and under gevent's own WSGI server, where a
:class:`Connection` is the server's ``handler_class``. It replaces gunicorn's own reading and
writing, which costs as much as the rest of a request (README.rst, Speed).
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import Any

import gevent
from gevent.pywsgi import WSGIServer

from gateway.lmstudio import sockets
from gateway.logs import Throttle
from gateway.request import SOCKET
from gateway.serving import descriptors
from gateway.serving.parsing import RequestRejected, parse
from gateway.serving.reading import READ_BYTES, ConnectionEnded, RequestBody, RequestReader
from gateway.serving.response import ClientStalled, Response, final_response, send_all

Environ = dict[str, Any]

#: Seconds within which the head of a connection's first request must arrive.
FIRST_HEAD = 10.0
#: Seconds that a connection waits for the head of each further request.
KEEP_ALIVE = 65.0
#: Seconds for which a client that sends one request after another is not idle.
BETWEEN_REQUESTS = 1.0
#: The most idle connections that are considered for giving way to a new one.
MAX_CANDIDATES = 64
#: Seconds to keep reading after the last response of a connection. If the gateway closed the
#: connection at once, a client that is still sending would lose the response.
LINGER = 2.0
#: Seconds that idle client connections stay open once the server drains.
DRAIN_KEEP_ALIVE = 1.0
#: Seconds before the end of the grace period at which the remaining streams get an error event.
ABORT_MARGIN = 2.0

logger = logging.getLogger(__name__)


class Connection:
    """One client's connection, from its first request until it closes."""

    def __init__(self, sock: Any, address: Any, server: Server) -> None:
        self._socket = sock
        self._server = server
        self._reader = RequestReader(sock)
        #: Whether no request has arrived yet.
        self._new = True
        self._base: Environ = {**server.get_environ(), SOCKET: sock}
        if isinstance(address, tuple):
            self._base["REMOTE_ADDR"], self._base["REMOTE_PORT"] = address[0], str(address[1])

    def handle(self) -> None:
        """Serve requests until either side closes the connection."""
        try:
            while self._serve_one():
                pass
        except ClientStalled:
            self._server.throttle.warning(
                "stalled", "closed a connection whose client did not read its response"
            )
        except (ConnectionEnded, OSError):
            pass  # the client has disconnected
        finally:
            self._socket.close()

    def close_idle(self) -> None:
        """Close a connection that waits for its next request; :meth:`handle` sees the end."""
        self._server.idle.pop(self, None)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def can_give_way(self, long_idle: bool) -> bool:
        """Whether closing the connection loses no request: nothing has arrived, and a client that
        has been served has been idle for long."""
        return (self._new or long_idle) and sockets.peek(self._socket) is None

    def _serve_one(self) -> bool:
        """Serve the next request. Returns whether the connection can carry another one."""
        environ = self._base.copy()
        try:
            keep_alive, length = parse(self._read_head(), environ)
            body = RequestBody(self._reader, length, self._continue(environ))
        except RequestRejected as error:
            self._reject(error, environ)
            return False
        environ["wsgi.input"] = body
        keep_alive = keep_alive and not self._server.draining
        response = Response(self._socket, environ, body, keep_alive)
        try:
            response.send(self._server.application)
        finally:
            if body.rejected is not None:
                self._report(body.rejected)
        if not response.keep_alive:
            self._linger(body)
            return False
        while not body.done:
            body.read(READ_BYTES)
        if self._reader.pending:
            gevent.sleep(0)  # a client that pipelines requests must not starve the others
        return True

    def _read_head(self) -> bytes:
        self._server.idle[self] = time.monotonic()
        timeout = FIRST_HEAD if self._new else KEEP_ALIVE
        try:
            return self._reader.head(DRAIN_KEEP_ALIVE if self._server.draining else timeout)
        finally:
            self._new = False
            self._server.idle.pop(self, None)

    def _continue(self, environ: Environ) -> Callable[[], None] | None:
        """How to send ``100 Continue``; None unless the client waits for it."""
        expected = environ.get("HTTP_EXPECT")
        if expected is None:
            return None
        if expected.lower() != "100-continue":
            raise RequestRejected("The Expect header is not supported.", status=417)
        if environ["SERVER_PROTOCOL"] == "HTTP/1.0":
            return None
        return lambda: self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _reject(self, error: RequestRejected, environ: Environ) -> None:
        """Respond to a malformed request."""
        self._report(error)
        send_all(self._socket, final_response(error, environ))
        self._linger(None)

    def _report(self, error: RequestRejected) -> None:
        """Log why a request was rejected. Its bytes stay out of the log: they may hold a key."""
        self._server.throttle.warning(error.message, "rejected a malformed request: %s", error)

    def _linger(self, body: RequestBody | None) -> None:
        """Discard what the client still sends, for at most :data:`LINGER` seconds."""
        if body is not None and body.done:
            return
        self._socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            if not self._socket.recv(READ_BYTES):
                return


class Server(WSGIServer):  # type: ignore[misc]
    """gevent's WSGI server, which can also drain."""

    handler_class = Connection
    #: Connections accepted at once, before :meth:`handle` sees any of them. All must fit into the
    #: descriptors that are left when they are short.
    max_accept = 16

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: The connections that wait for their next request, those that wait for longest first.
        #: Each with the time.monotonic() since which it waits.
        self.idle: dict[Connection, float] = {}
        #: Logs what clients can cause again and again.
        self.throttle = Throttle(logger)
        #: Whether each response is the last one of its connection.
        self.draining = False
        super().__init__(*args, **kwargs)

    def update_environ(self) -> None:
        """Set the keys that WSGI requires; gevent would look the address up in the DNS."""
        host, port, *_ = self.address if isinstance(self.address, tuple) else ("localhost", 0)
        self.environ["SERVER_NAME"], self.environ["SERVER_PORT"] = str(host), str(port)
        self.environ["wsgi.input_terminated"] = True

    def handle(self, sock: Any, address: Any) -> None:
        """Serve a new connection, unless descriptors are short and no request of it can pass the
        allowlist. When they are short, the connection that has been idle for longest gives way.
        """
        if descriptors.are_short(sock.fileno()):
            self.throttle.warning("descriptors", "open files run short: closing idle connections")
            access = self.application.extensions["gateway"].access
            if not access.may_admit(address[0] if isinstance(address, tuple) else ""):
                sock.close()
                return
            self._close_longest_idle()
        super().handle(sock, address)

    def _close_longest_idle(self) -> None:
        until = time.monotonic() - BETWEEN_REQUESTS
        for connection, since in islice(self.idle.items(), MAX_CANDIDATES):
            if connection.can_give_way(since <= until):
                connection.close_idle()
                return

    def close_idle(self) -> None:
        """Close the connections that wait for their next request."""
        for connection in list(self.idle):
            connection.close_idle()


def drain(app: Any, servers: list[Server], grace: float) -> None:
    """Drain what a process serves, within a grace period of ``grace`` seconds.

    Event streams end at once, idle connections and event streams that nobody reads soon; inference
    streams that are still in flight shortly before the end get an error event.
    """
    app.extensions["gateway"].drain()
    for server in servers:
        server.draining = True
    # A client that is about to send its next request gets a response, with Connection: close.
    # (A connection whose response ends later has as much time.)
    gevent.sleep(DRAIN_KEEP_ALIVE)
    app.extensions["gateway"].cut_streams()
    for server in servers:
        server.close_idle()
    gevent.sleep(max(0.0, grace - DRAIN_KEEP_ALIVE - ABORT_MARGIN))
    app.extensions["gateway"].abort()
