"""LM Studio's HTTP side: a requests session whose adapter relays as the bytes arrive.

requests and urllib3 open the connections (TLS included); the adapter keeps them, writes the request
and hands out the answer before it has come: see :class:`Exchange`. The library's own way of reading
answers waits for whole chunks and gives no hold on a connection that is to be closed from outside.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast
from urllib.parse import urlsplit

import certifi
import gevent.monkey
import requests
from gevent.socket import wait_read
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

from gateway import http1
from gateway.errors import BadGateway, Unreachable, UpstreamTimeout
from gateway.settings import Settings

CONNECT_TIMEOUT = 5.0
#: LM Studio closes a connection that was idle for 5 s; one that is nearly as old is not used again.
MAX_IDLE_SECONDS = 4.0
READ_BYTES = 65536

Connection = HTTPConnection
_PlainSocket = gevent.monkey.get_original("socket", "socket")
#: On Windows the flag is missing; gevent's sockets never wait anyway.
_PEEK = socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0)


class ConnectionBroken(Exception):
    """LM Studio closed or garbled an exchange."""


class Silence(Exception):
    """Nothing came within the given time; the exchange goes on."""


class Exchange(requests.Response):
    """One request that was sent to LM Studio, and its answer as it comes.

    ``status_code`` and ``headers`` are there after :meth:`wait_head`; :meth:`receive` gives the
    payload of one arrival. :meth:`abort` may be called from anywhere, the event loop included.
    """

    head: http1.Head

    def __init__(self, adapter: LMStudioAdapter, connection: Connection, method: str) -> None:
        # requests.Response.__init__ makes a cookie jar and more, for every answer: not needed here
        self._content = False  # type: ignore[assignment]
        self._content_consumed = False
        self.history: list[requests.Response] = []
        self.raw: Any = self
        self.encoding = None
        self._adapter = adapter
        self._connection: Connection | None = connection
        self._socket: Any = connection.sock
        self._method = method
        self._buffer = b""
        self._body: http1.Body = http1.UntilClose()

    def wait_head(self, timeout: float | None) -> http1.Head:
        """Status and headers; raises Silence when they are not complete within ``timeout`` s."""
        deadline = None if timeout is None else time.monotonic() + timeout
        # Through the event loop once per request, even when the answer is there already: a busy
        # keep-alive connection would otherwise starve its neighbours.
        self._wait_readable(deadline)
        while True:
            head = self._take_head()
            if head is not None:
                return head
            self._fill(_remaining(deadline))

    def receive(self, timeout: float | None) -> bytes:
        """The payload of the next arrival; ``b""`` at the end of the answer.

        Raises Silence after ``timeout`` s without any, ConnectionBroken when the answer breaks off.
        """
        body = self._body
        while not body.done:
            if self._buffer:
                data, self._buffer = self._buffer, b""
                payload = self._feed(data)
                if payload:
                    return payload
            else:
                self._fill(timeout)
        return b""

    def read(self, amount: int | None = None, decode_content: bool = False) -> bytes:
        """For requests' own use (``.content``): the next arrival."""
        return self.receive(None)

    @property
    def complete(self) -> bool:
        """Whether the whole answer has been received."""
        return self._body.done

    def abort(self, reason: str = "") -> None:
        """Shut the connection at once; whoever waits on it sees it end, for this reason."""
        self.aborted = True
        self.abort_reason = self.abort_reason or reason
        self._reusable = False
        if self._connection is not None:
            _shut(self._socket)

    def close(self) -> None:
        """Give the connection back when the answer is complete, else close it. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self.on_close is not None:
            self.on_close(self)
        if self._reusable and self._body.done and not self._body.excess and not self._buffer:
            self._adapter.put_back(connection)
        else:
            connection.close()

    _reusable = False
    #: Whether the exchange was cut from our side, and why, if the client is still there to know.
    aborted = False
    abort_reason = ""
    #: Called once, when the exchange gives up its connection.
    on_close: Callable[[Exchange], None] | None = None

    def _take_head(self) -> http1.Head | None:
        """The answer's head once the buffer has it whole; interim (1xx) heads are skipped."""
        while True:
            end, skip = _head_end(self._buffer)
            if end < 0:
                if len(self._buffer) > http1.MAX_HEAD_BYTES:
                    raise ConnectionBroken("the head of the answer is too large")
                return None
            try:
                head = http1.parse_head(self._buffer[:end])
                self._buffer = self._buffer[end + skip :]
                if head.status < 200:
                    if head.status == 101:
                        raise ConnectionBroken("LM Studio switched protocols")
                    continue
                self._body = http1.body_of(head, self._method)
            except http1.Malformed as fault:
                raise ConnectionBroken(str(fault)) from None
            self.head = head
            self.status_code = head.status
            self.reason = head.reason
            self._reusable = head.keep_alive
            return head

    def _feed(self, data: bytes) -> bytes:
        try:
            return self._body.feed(data)
        except http1.Malformed as fault:
            raise ConnectionBroken(str(fault)) from None

    def _fill(self, timeout: float | None) -> None:
        """Read what is there, waiting up to ``timeout`` s for it."""
        self._socket.settimeout(timeout)
        try:
            data = self._socket.recv(READ_BYTES)
        except TimeoutError:
            raise Silence from None
        except OSError as error:
            raise ConnectionBroken(error.strerror or "the connection broke") from None
        if data:
            self._buffer += data
            return
        self._ended()

    def _ended(self) -> None:
        try:
            if not hasattr(self, "head"):
                raise ConnectionBroken("LM Studio closed the connection without an answer")
            self._body.end()
        except http1.Malformed as fault:
            raise ConnectionBroken(str(fault)) from None

    def _wait_readable(self, deadline: float | None) -> None:
        if self._buffer:
            return
        try:
            wait_read(self._socket.fileno(), _remaining(deadline), Silence())
        except OSError as error:
            raise ConnectionBroken(error.strerror or "the connection broke") from None


class LMStudioAdapter(HTTPAdapter):
    """Sends prepared requests over kept connections to one server.

    ``send`` returns an :class:`Exchange`, with ``stream=True`` before its head has come.
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
        """Send a request. Raises Unreachable when no connection can be had, ConnectionBroken when
        it breaks off; only what broke before its first byte was sent is tried again."""
        method = cast(str, request.method)
        body: Any = request.body
        first = _serialise(method, request)
        if isinstance(body, bytes):
            first += body
        connection = self._connection_with(first)
        exchange = Exchange(self, connection, method)
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
        """Keep a connection for the next request."""
        self._idle.append((connection, time.monotonic()))

    def close_old(self) -> None:
        """Close kept connections that are too old to be used again."""
        oldest = time.monotonic() - MAX_IDLE_SECONDS
        while self._idle and self._idle[0][1] < oldest:
            self._idle.popleft()[0].close()

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[0].close()

    def _connection_with(self, first: bytes) -> Connection:
        """A connection on which the first bytes have been sent."""
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
        """The youngest kept connection that is still good. Older ones are closed on the way."""
        self.close_old()
        while self._idle:
            connection = self._idle.pop()[0]
            if _is_quiet(connection.sock):
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


class Upstream:
    """The HTTP client of one worker."""

    def __init__(self, settings: Settings) -> None:
        self.base_url = settings.lmstudio_base_url
        #: ``host:port`` as it goes into ``Host``.
        self.authority = urlsplit(self.base_url).netloc
        self.authorization = (
            f"Bearer {settings.lmstudio_api_token}" if settings.lmstudio_api_token else None
        )
        self.adapter = LMStudioAdapter(self.base_url)
        self.session = requests.Session()
        self.session.trust_env = False  # no proxies, no .netrc from the environment
        self.session.mount(self.base_url, self.adapter)

    def send(
        self,
        method: str,
        target: str,
        headers: dict[str, str],
        body: bytes | Iterator[bytes] | None,
    ) -> Exchange:
        """Send a request for ``target`` (path and query as they go on the wire)."""
        request = requests.PreparedRequest()
        request.method = method
        request.url = target
        request.headers = cast("CaseInsensitiveDict[str]", headers)
        request.body = cast(Any, body)
        return self.adapter.send(request, stream=True)

    def greet(self, timeout: float) -> None:
        """Ask LM Studio for a sign of life within ``timeout`` s; raises a GatewayError."""
        try:
            with gevent.Timeout(timeout, Silence()):
                headers = {"Host": self.authority, "Connection": "close"}
                exchange = self.send("GET", "/lmstudio-greeting", headers, None)
                try:
                    exchange.wait_head(timeout)
                finally:
                    exchange.close()
        except Silence:
            raise UpstreamTimeout(f"LM Studio did not answer within {timeout:g} s.") from None
        except ConnectionBroken as fault:
            raise BadGateway(f"LM Studio closed the connection: {fault}.") from None


class NothingSent(Exception):
    """The connection failed before it took the first byte."""


def _serialise(method: str, request: requests.PreparedRequest) -> bytes:
    lines = [f"{method} {request.url} HTTP/1.1\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in request.headers.items()]
    lines.append("\r\n")
    return "".join(lines).encode("latin-1")


def _send(sock: Any, data: bytes) -> None:
    """Send everything. Raises NothingSent as long as a retry is harmless; a failure after that is
    left to the reading side, where an early answer (a 413, say) may be waiting."""
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
    """Pass a body on piece by piece; when LM Studio stops reading, its answer may be there."""
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


def _head_end(buffer: bytes) -> tuple[int, int]:
    """Where the head ends and how many bytes the empty line has; -1 when it is not there yet."""
    end = buffer.find(b"\r\n\r\n")
    if end >= 0:
        return end, 4
    return buffer.find(b"\n\n"), 2


def _borrow(sock: Any) -> socket.socket:
    """The same file descriptor as a plain socket, for calls that must not go through gevent or TLS.
    To be detached, never closed. (The family is not looked up: these calls don't depend on it.)"""
    plain: socket.socket = _PlainSocket(socket.AF_INET, socket.SOCK_STREAM, 0, sock.fileno())
    return plain


def _is_quiet(sock: Any) -> bool:
    """Whether an idle connection is open with nothing to read (anything else: do not use it)."""
    plain = _borrow(sock)
    try:
        plain.recv(1, _PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        plain.detach()
    return False


def _shut(sock: Any) -> None:
    plain = _borrow(sock)
    try:
        plain.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    finally:
        plain.detach()


def _remaining(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.001, deadline - time.monotonic())
