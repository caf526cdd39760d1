"""A requests transport adapter that returns a response before any of it has arrived.

urllib3 opens the connections (TLS included); the adapter keeps them and writes the requests. It
does not use the library's response, which waits for whole chunks and can't be aborted from
elsewhere: see :class:`.exchange.Exchange`.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import certifi
import requests
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

from gateway.errors import Unreachable
from gateway.lmstudio import sockets
from gateway.lmstudio.addresses import Addresses
from gateway.lmstudio.exchange import Exchange

#: Seconds to open a connection.
CONNECT_TIMEOUT = 5.0
#: LM Studio closes a connection after 5 s without a request. A connection that may be closed while
#: the next request is on its way is not reused.
MAX_IDLE_SECONDS = 4.0

#: Seconds of silence after which the kernel asks whether LM Studio is still there, seconds between
#: two such questions, and seconds after which it gives the connection up: below the minute within
#: which an LM Studio that vanished without a word (power, network) must be noticed.
KEEP_ALIVE_IDLE = 15
KEEP_ALIVE_INTERVAL = 5
DEAD_AFTER = 55

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
        self._addresses = Addresses(self._host, self._port)
        self._idle: deque[tuple[Connection, float]] = deque()
        #: Called when LM Studio can't be connected to.
        self.on_trouble: Callable[[], None] = lambda: None

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> Exchange:
        """Send a request; raises what :meth:`.Exchange.send` and, without ``stream``,
        :meth:`.Exchange.wait_head` raise."""
        exchange = Exchange(self, request)
        try:
            exchange.send()
            if not stream:
                head = exchange.wait_head(timeout)
                exchange.headers = CaseInsensitiveDict(head.headers)
        except BaseException:
            exchange.close()
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

    def take_idle(self) -> Connection | None:
        """Return the most recently used connection that is still open, if there is one."""
        self.close_stale()
        while self._idle:
            connection = self._idle.pop()[0]
            if sockets.peek(connection.sock) is None:
                return connection
            connection.close()
        return None

    def connect(self) -> Connection:
        """Open a new connection, to the first address that accepts it; raises Unreachable."""
        with suppress(OSError):  # the name can't be resolved
            for address in self._addresses.in_turn():
                connection = self._connection(address)
                try:
                    connection.connect()
                except (HTTPError, OSError):
                    connection.close()
                    continue
                except BaseException:
                    connection.close()
                    raise
                self._addresses.worked(address)
                return connection
        self.on_trouble()
        raise Unreachable("LM Studio can't be reached. Is it running, with its server on?")

    def _connection(self, address: str) -> Connection:
        options = [*HTTPConnection.default_socket_options, *keep_alive_options()]
        if not self._tls:
            return HTTPConnection(
                address, self._port, timeout=CONNECT_TIMEOUT, socket_options=options
            )
        return HTTPSConnection(
            address,
            self._port,
            timeout=CONNECT_TIMEOUT,
            socket_options=options,
            cert_reqs="CERT_REQUIRED",
            ca_certs=os.environ.get("SSL_CERT_FILE") or certifi.where(),
            # the certificate is for the name
            server_hostname=self._host,
        )


def keep_alive_options() -> list[tuple[int, int, int]]:
    """The socket options of TCP keep-alive, as far as the platform has them."""
    probes = (DEAD_AFTER - KEEP_ALIVE_IDLE) // KEEP_ALIVE_INTERVAL
    wanted = {
        "TCP_KEEPIDLE": KEEP_ALIVE_IDLE,
        "TCP_KEEPALIVE": KEEP_ALIVE_IDLE,  # the same on macOS
        "TCP_KEEPINTVL": KEEP_ALIVE_INTERVAL,
        "TCP_KEEPCNT": probes,
        # keep-alive is off while sent bytes wait to be acknowledged; this is not (ms, Linux only)
        "TCP_USER_TIMEOUT": DEAD_AFTER * 1000,
    }
    found = {name: getattr(socket, name, None) for name in wanted}
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
        (socket.IPPROTO_TCP, option, wanted[name])
        for name, option in found.items()
        if option is not None
    ]
