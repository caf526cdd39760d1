"""One client's connection: read a request, call the application, write the response (RFC 9112).

The same code serves under gunicorn's gevent worker and under gevent's own WSGI server, where a
:class:`Connection` is the server's ``handler_class``. It replaces gunicorn's own reading and
writing, which costs as much as all the rest of a request (README.rst, Speed).
"""

from __future__ import annotations

import logging
import socket
import time
from contextlib import suppress
from typing import Any

import gevent
from gevent.pywsgi import WSGIServer

from gateway.request import SOCKET
from gateway.serving.parsing import RequestRejected, parse
from gateway.serving.reading import READ_BYTES, ConnectionEnded, RequestBody, RequestReader
from gateway.serving.response import Response, final_response

Environ = dict[str, Any]

#: Seconds that an idle connection is kept, and that a request's head may take to come.
KEEP_ALIVE = 65.0
#: Seconds for which a connection is read from after its last answer, which is lost to a client
#: that is still sending if it is closed at once.
LINGER = 2.0
#: Seconds after the beginning of the end for which idle client connections are kept.
IDLE_AT_END = 1.0
#: Seconds before the end of the grace period at which running streams get an error event.
LAST_WORDS = 2.0

logger = logging.getLogger(__name__)


# Serving --------------------------------------------------------------------------------------


class Connection:
    """One client's connection, from its first request to its end."""

    def __init__(self, sock: Any, address: Any, server: Server) -> None:
        self._socket = sock
        self._server = server
        self._received = RequestReader(sock)
        self._base: Environ = {**server.get_environ(), SOCKET: sock}
        if isinstance(address, tuple):
            self._base["REMOTE_ADDR"], self._base["REMOTE_PORT"] = address[0], str(address[1])

    def handle(self) -> None:
        """Serve requests until one of the two sides has had enough."""
        try:
            while self._serve_one():
                pass
        except (ConnectionEnded, OSError):
            pass  # the client has left
        finally:
            self._socket.close()

    def hang_up(self) -> None:
        """End a connection that waits for its next request."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _serve_one(self) -> bool:
        """Serve the next request; returns whether there may be another."""
        environ = self._base.copy()
        try:
            self._server.waiting.add(self)
            try:
                head = self._received.head(IDLE_AT_END if self._server.ending else KEEP_ALIVE)
            finally:
                self._server.waiting.discard(self)
            keep, length = parse(head, environ)
            body = RequestBody(self._received, length, self._invitation(environ))
        except RequestRejected as refusal:
            self._refuse(refusal, environ)
            return False
        environ["wsgi.input"] = body
        answer = Response(self._socket, environ, body, keep and not self._server.ending)
        answer.send(self._server.application)
        if not answer.keep:
            self._linger(body)
            return False
        while not body.done:
            body.read(READ_BYTES)
        if self._received.pending:
            gevent.sleep(0)  # a client that sends its requests at once must not starve the others
        return True

    def _invitation(self, environ: Environ) -> Any:
        """What invites the body of a client that waits for ``100 Continue``."""
        expected = environ.get("HTTP_EXPECT")
        if expected is None:
            return None
        if expected.lower() != "100-continue":
            raise RequestRejected("The request expects what is not known here.", status=417)
        if environ["SERVER_PROTOCOL"] == "HTTP/1.0":
            return None
        return lambda: self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _refuse(self, refusal: RequestRejected, environ: Environ) -> None:
        """Response what is no request of ours, without its bytes in the log: a key may be there."""
        logger.info("refused what is no request: %s", refusal)
        self._socket.sendall(final_response(refusal, environ))
        self._linger(None)

    def _linger(self, body: RequestBody | None) -> None:
        """Read away what the client is still sending, for a while."""
        if body is not None and body.done:
            return
        self._socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            if not self._socket.recv(READ_BYTES):
                return


class Server(WSGIServer):  # type: ignore[misc]
    """gevent's WSGI server, which can be told to come to an end."""

    handler_class = Connection

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: The connections that wait for their next request.
        self.waiting: set[Connection] = set()
        #: Whether answers say that they are the last ones of their connection.
        self.ending = False
        super().__init__(*args, **kwargs)

    def update_environ(self) -> None:
        """WSGI wants them; gevent would look the address up in the DNS."""
        host, port, *_ = self.address if isinstance(self.address, tuple) else ("localhost", 0)
        self.environ["SERVER_NAME"], self.environ["SERVER_PORT"] = str(host), str(port)
        self.environ["wsgi.input_terminated"] = True

    def end_waiting(self) -> None:
        """Close the connections that wait for their next request."""
        for connection in list(self.waiting):
            connection.hang_up()


def drain(app: Any, servers: list[Server], grace: float) -> None:
    """Bring what a process serves to its end, for ``grace`` seconds at most: event streams end at
    once, idle connections soon, and inference streams with an error event if they must."""
    app.extensions["gateway"].drain()
    for server in servers:
        server.ending = True
    # A client that is about to send its next request gets it answered, with Connection: close.
    # (One whose answer ends later has as much time.)
    gevent.sleep(IDLE_AT_END)
    for server in servers:
        server.end_waiting()
    gevent.sleep(max(0.0, grace - IDLE_AT_END - LAST_WORDS))
    app.extensions["gateway"].proxy.abort_all()
