"""A requests transport adapter that returns a response before any of it has arrived.

urllib3 opens the connections (TLS included); the adapter keeps them and writes the requests. It
does not use the library's response, which waits for whole chunks and can't be aborted from
elsewhere: see :class:`.exchange.Exchange`.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, cast
from urllib.parse import urlsplit

import certifi
import requests
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

from gateway import sockets
from gateway.errors import Unreachable
from gateway.lmstudio.exchange import ConnectionBroken, Exchange

#: Seconds to open a connection.
CONNECT_TIMEOUT = 5.0
#: LM Studio closes a connection after 5 s without a request. A connection that may be closed while
#: the next request is on its way is not reused.
MAX_IDLE_SECONDS = 4.0

Connection = HTTPConnection


class LMStudioAdapter(HTTPAdapter):
    """Sends prepared requests to one server, over connections that it keeps open.

    With ``stream=True``, ``send`` returns the :class:`Exchange` before the response has begun.
    """

    def __init__(self, base_url: str) -> None:
        super().__init__()
        parts = urlsplit(base_url)
        self._tls = parts.scheme == "https"
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or (443 if self._tls else 80)
        self._idle: deque[tuple[Connection, float]] = deque()

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> Exchange:
        """Send a request.

        Raises Unreachable when no connection can be opened, ConnectionBroken when it fails. A
        request is sent again only if the connection failed before its first byte was sent.
        """
        method = cast(str, request.method)
        body: Any = request.body
        first = _serialise(method, request)
        if isinstance(body, bytes):
            first += body
        connection = self._send_first(first)
        exchange = Exchange(connection, method, self.put_back)
        exchange.request = request
        exchange.url = cast(str, request.url)
        try:
            if body is not None and not isinstance(body, bytes):
                _upload(connection.sock, body, chunked="Content-Length" not in request.headers)
            if not stream:
                head = exchange.wait_head(timeout)
                exchange.headers = CaseInsensitiveDict(head.headers)
        except BaseException:
            connection.close()
            raise
        return exchange

    def put_back(self, connection: Connection) -> None:
        """Keep an idle connection for the next request."""
        self._idle.append((connection, time.monotonic()))

    def close_stale(self) -> None:
        """Close the connections that have been idle for too long to be used again."""
        oldest = time.monotonic() - MAX_IDLE_SECONDS
        while self._idle and self._idle[0][1] < oldest:
            self._idle.popleft()[0].close()

    def close(self) -> None:
        """Close every idle connection."""
        while self._idle:
            self._idle.pop()[0].close()

    def _send_first(self, first: bytes) -> Connection:
        """Send the first bytes of a request; returns the connection, an idle or a new one."""
        connection = self._take_idle()
        if connection is not None:
            try:
                _send(connection.sock, first)
                return connection
            except NothingSent:
                connection.close()
        connection = self._connect()
        try:
            _send(connection.sock, first)
        except NothingSent:
            connection.close()
            raise ConnectionBroken("LM Studio closed the connection") from None
        return connection

    def _take_idle(self) -> Connection | None:
        """Return the most recently used connection that is still open, if there is one."""
        self.close_stale()
        while self._idle:
            connection = self._idle.pop()[0]
            if sockets.peek(connection.sock) is None:
                return connection
            connection.close()
        return None

    def _connect(self) -> Connection:
        connection: Connection
        if self._tls:
            connection = HTTPSConnection(
                self._host,
                self._port,
                timeout=CONNECT_TIMEOUT,
                cert_reqs="CERT_REQUIRED",
                ca_certs=os.environ.get("SSL_CERT_FILE") or certifi.where(),
            )
        else:
            connection = HTTPConnection(self._host, self._port, timeout=CONNECT_TIMEOUT)
        try:
            connection.connect()
        except (HTTPError, OSError):
            connection.close()
            raise Unreachable(
                "LM Studio can't be reached. Is it running, with its server on?"
            ) from None
        return connection


class NothingSent(Exception):
    """The connection failed before a byte was sent, so a retry can't repeat anything."""


def _serialise(method: str, request: requests.PreparedRequest) -> bytes:
    lines = [f"{method} {request.url} HTTP/1.1\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in request.headers.items()]
    lines.append("\r\n")
    return "".join(lines).encode("latin-1")


def _send(sock: Any, data: bytes) -> None:
    """Send all of ``data``. Raises NothingSent when the connection fails before the first byte.

    A later failure is ignored: LM Studio may have responded early (with a 413, say) and closed the
    connection, so reading the response shows what happened.
    """
    sock.settimeout(None)
    try:
        sent = sock.send(data)
    except OSError:
        raise NothingSent from None
    if sent < len(data):
        try:
            sock.sendall(memoryview(data)[sent:])
        except OSError:
            return


def _upload(sock: Any, pieces: Iterable[bytes], chunked: bool) -> None:
    """Send a body piece by piece. Failures are ignored, for the reason given in :func:`_send`."""
    for piece in pieces:
        try:
            sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        except OSError:
            return
    if chunked:
        try:
            sock.sendall(b"0\r\n\r\n")
        except OSError:
            return
