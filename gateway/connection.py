"""HTTP/1.1 on a client's connection: requests in, WSGI, answers out (RFC 9112).

One reader for both servers that the gateway runs under, gunicorn's gevent worker and gevent's own
WSGI server, where a :class:`Connection` is the server's ``handler_class``. It is strict, since what
two parties read differently can be smuggled past one of them, and it is short, since every request
pays for it: gunicorn's reading and answering costs as much as all the rest (README.rst, Speed).
"""

from __future__ import annotations

import logging
import re
import socket
import time
from contextlib import suppress
from email.utils import formatdate
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes

import gevent
from gevent import GreenletExit
from gevent.pywsgi import WSGIServer

from gateway import errors
from gateway.access import REQUEST_ID, name_request
from gateway.errors import GatewayError, Headers
from gateway.http1 import HEADER_LINE, TOKEN

Environ = dict[str, Any]

#: Where the client's socket is kept in the environ.
SOCKET = "gateway.socket"
#: Bytes of a line, header lines of a request, bytes of a whole head.
MAX_LINE = 8190
MAX_FIELDS = 100
MAX_HEAD = 65536
#: Seconds that an idle connection is kept, and that a request's head may take to come.
KEEP_ALIVE = 65.0
#: Seconds in which each piece of a request body must come: a trickling client is not served.
BODY_TIMEOUT = 30.0
#: How much of a body that nobody wanted is read for the sake of keeping the connection.
MAX_UNREAD = 65536
#: Seconds for which a connection is read from after its last answer, which is lost to a client
#: that is still sending if it is closed at once.
LINGER = 2.0
#: Seconds after the beginning of the end for which idle client connections are kept.
IDLE_AT_END = 1.0
#: Seconds before the end of the grace period at which running streams get an error event.
LAST_WORDS = 2.0
_READ = 65536

_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e]+) HTTP/1\.([01])")
_ABSOLUTE = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#\[\]]*|\[[0-9A-Fa-f:.]+\](?::\d*)?)(?=[/?#]|$)"
)
_LENGTH = re.compile(r"[0-9]{1,18}")
_CHUNK = re.compile(
    rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[ \t]*" + TOKEN + rb"(?:=(?:" + TOKEN + rb'|"[^"\\]*"))?)*'
)
#: What can be there once only; of two, it is not clear who means which.
_SINGLE = frozenset({"CONTENT_LENGTH", "CONTENT_TYPE", "HTTP_HOST", "HTTP_TRANSFER_ENCODING"})
#: What a trailer may not carry (RFC 9110 §6.5.1).
_NO_TRAILER = _SINGLE | {"HTTP_TRAILER", "HTTP_AUTHORIZATION", "HTTP_TE"}

logger = logging.getLogger(__name__)


class Refused(GatewayError):
    """What came is no request that can be served; the connection ends with the answer."""

    status, code = 400, "bad_request"


class Ended(Exception):
    """The client has closed its connection, or was silent for too long."""


# Reading --------------------------------------------------------------------------------------


class Received:
    """What a client has sent and nobody has taken yet."""

    def __init__(self, sock: Any) -> None:
        self._socket = sock
        self._buffer = b""

    @property
    def pending(self) -> bool:
        """Whether something has come already."""
        return bool(self._buffer)

    def head(self, timeout: float) -> bytes:
        """A request's head without its empty line. Raises Refused as soon as it can't become one,
        Ended when it does not come."""
        deadline = time.monotonic() + timeout
        end = -1
        while True:
            if self._buffer:
                self._buffer = self._buffer.removeprefix(b"\r\n")
                end = self._buffer.find(b"\r\n\r\n")
                if end >= 0:
                    break
                if self._buffer not in (b"", b"\r"):
                    _check_beginning(self._buffer)
            self._more(deadline)
        if end > MAX_HEAD:
            raise Refused("The request's head is too large.", status=431)
        head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
        return head

    def line(self, deadline: float) -> bytes:
        """A line without its CRLF."""
        while True:
            end = self._buffer.find(b"\r\n")
            if end >= 0:
                line, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
                if b"\n" in line or b"\r" in line:
                    raise Refused("A line of the body's framing holds a bare CR or LF.")
                return line
            if len(self._buffer) > MAX_LINE or b"\n" in self._buffer:
                raise Refused("A line of the body's framing is too long or ends with a bare LF.")
            self._more(deadline)

    def read(self, size: int, deadline: float) -> bytes:
        """So many bytes. Raises Ended when fewer come."""
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        missing = size - len(data)
        if not missing:
            return data
        pieces = [data]
        while missing:
            pieces.append(self._receive(min(missing, _READ), deadline))
            missing -= len(pieces[-1])
        return b"".join(pieces)

    def _more(self, deadline: float) -> None:
        data = self._receive(_READ, deadline)
        self._buffer = self._buffer + data if self._buffer else data

    def _receive(self, size: int, deadline: float) -> bytes:
        self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
        data: bytes = self._socket.recv(size)
        if not data:
            raise Ended
        return data


class Body:
    """A request's body, as ``wsgi.input``. Of a file's methods it has ``read``, which is what the
    gateway (and werkzeug) uses."""

    def __init__(self, received: Received, length: int | None, invite: Any = None) -> None:
        self._received = received
        #: Bytes missing; of the current chunk, when chunks are what comes.
        self._left = length or 0
        self._chunked = length is None
        self._invite = invite
        self.done = length == 0
        #: Whether it broke its framing: what follows on the connection can't be told.
        self.broken = False

    def read(self, size: int | None = None) -> bytes:
        """``size`` bytes, fewer only at the end; all of them without a size.

        Raises TimeoutError, Ended (the client left) or Refused (bad framing).
        """
        if self.done:
            return b""
        if self._invite is not None:
            self._invite, invite = None, self._invite
            invite()
        if self.broken:
            raise Refused("The request's body is broken.")
        try:
            return self._pieces(size if size is not None and size >= 0 else None)
        except BaseException:
            self.broken = True
            raise

    def spare(self) -> bool:
        """Whether what was not read is little, is on its way, and can be read away."""
        return not (self._invite or self.broken or self._chunked) and self._left <= MAX_UNREAD

    def _pieces(self, size: int | None) -> bytes:
        if not self._chunked and (size is None or size >= self._left):
            size = self._left
        pieces = []
        missing = size
        deadline = time.monotonic() + BODY_TIMEOUT
        while missing != 0 and not self.done:
            if not self._left:
                self._begin_chunk(deadline)
                continue
            wanted = min(self._left, _READ) if missing is None else min(self._left, missing)
            pieces.append(self._received.read(wanted, deadline))
            self._left -= wanted
            if missing is None:
                deadline = time.monotonic() + BODY_TIMEOUT
            else:
                missing -= wanted
            if not self._left:
                self._end_data(deadline)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _begin_chunk(self, deadline: float) -> None:
        found = _CHUNK.fullmatch(self._received.line(deadline))
        if found is None:
            raise Refused("A chunk of the body has no proper size.")
        self._left = int(found[1], 16)
        if self._left:
            return
        for _ in range(MAX_FIELDS):
            trailer = self._received.line(deadline)
            if not trailer:
                self.done = True
                return
            if _field(trailer)[0] in _NO_TRAILER:
                raise Refused("A trailer of the body may not be one.")
        raise Refused("The body has too many trailers.")

    def _end_data(self, deadline: float) -> None:
        if not self._chunked:
            self.done = True
        elif self._received.read(2, deadline) != b"\r\n":
            raise Refused("A chunk of the body is not as long as it says.")


def parse(head: bytes, environ: Environ) -> tuple[bool, int | None]:
    """Put a request's head into a WSGI environ.

    Returns whether the client wants to keep the connection, and the length of the body (None: it
    comes in chunks). Raises Refused.
    """
    first, *lines = head.split(b"\r\n")
    found = _REQUEST_LINE.fullmatch(first)
    if found is None:
        raise Refused("The request line is not acceptable.")
    if len(first) > MAX_LINE:
        raise Refused("The request line is too long.", status=414)
    target = found[2].decode("ascii")
    environ["REQUEST_METHOD"] = method = found[1].decode("ascii")
    environ["RAW_URI"] = target
    environ["PATH_INFO"], environ["QUERY_STRING"] = _path(method, target)
    old = found[3] == b"0"
    environ["SERVER_PROTOCOL"] = "HTTP/1.0" if old else "HTTP/1.1"
    if len(lines) > MAX_FIELDS:
        raise Refused("The request has too many headers.", status=431)
    for line in lines:
        key, value = _field(line)
        if key not in environ:
            environ[key] = value
        elif key in _SINGLE:
            raise Refused("A header is there twice that can be there only once.")
        elif key:
            environ[key] += ("; " if key == "HTTP_COOKIE" else ",") + value
    environ.pop("", None)
    connection = environ.get("HTTP_CONNECTION", "").lower()
    keep = "keep-alive" in connection if old else "close" not in connection
    return keep and method != "CONNECT", _length(environ, old)


def _path(method: str, target: str) -> tuple[str, str]:
    """PATH_INFO and QUERY_STRING of a request target."""
    if not target.startswith("/") and not (target == "*" and method == "OPTIONS"):
        # absolute-form, as a client of a forward proxy sends it: its host means nothing here
        target, changed = _ABSOLUTE.subn("", target, count=1)
        if not changed:
            raise Refused("The request's target is not acceptable.")
    path, _, query = target.partition("#")[0].partition("?")
    if "%" in path:
        path = unquote_to_bytes(path).decode("latin-1")
    return path or "/", query


@lru_cache(maxsize=2048)
def _field(line: bytes) -> tuple[str, str]:
    """A header line's key in the environ and its value; clients repeat most of them every time.

    The key is empty for a name with an underscore, which WSGI can't tell from one with a hyphen.
    """
    if len(line) > MAX_LINE:
        raise Refused("A header is too long.", status=431)
    found = HEADER_LINE.fullmatch(line)
    if found is None:
        raise Refused("A header is not acceptable.")
    name = found[1].decode("ascii").upper()
    if "_" in name:
        return "", ""
    key = name.replace("-", "_")
    if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        key = "HTTP_" + key
    return key, found[2].decode("latin-1")


def _length(environ: Environ, old: bool) -> int | None:
    """The length of the body, None when it is chunked (RFC 9112 §6.3)."""
    length = environ.get("CONTENT_LENGTH")
    coding = environ.get("HTTP_TRANSFER_ENCODING")
    if coding is not None:
        if coding.lower() != "chunked":
            raise Refused(
                "Bodies can be chunked, but have no other transfer coding.",
                status=501,
                code="unsupported_transfer_coding",
            )
        if length is not None or old:
            raise Refused("The length of the body is not clear.")
        return None
    if length is None:
        return 0
    if not _LENGTH.fullmatch(length):
        raise Refused("The Content-Length is not acceptable.")
    return int(length)


def _check_beginning(data: bytes) -> None:
    """Refuse what can't become a head, before all of it has come (if it ever does)."""
    first, line_end, _ = data.partition(b"\r\n")
    if line_end and not _REQUEST_LINE.fullmatch(first):
        raise Refused("The request line is not acceptable.")
    if b"\n" in first or not first or not re.match(TOKEN, first):
        raise Refused("This is no HTTP request.")
    if len(first) > MAX_LINE:
        raise Refused("The request line is too long.", status=414)
    if len(data) > MAX_HEAD:
        raise Refused("The request's head is too large.", status=431)


# Serving --------------------------------------------------------------------------------------


class Connection:
    """One client's connection, from its first request to its end."""

    def __init__(self, sock: Any, address: Any, server: Server) -> None:
        self._socket = sock
        self._server = server
        self._received = Received(sock)
        self._base: Environ = {**server.get_environ(), SOCKET: sock}
        if isinstance(address, tuple):
            self._base["REMOTE_ADDR"], self._base["REMOTE_PORT"] = address[0], str(address[1])

    def handle(self) -> None:
        """Serve requests until one of the two sides has had enough."""
        try:
            while self._serve_one():
                pass
        except (Ended, OSError):
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
            body = Body(self._received, length, self._invitation(environ))
        except Refused as refusal:
            self._refuse(refusal, environ)
            return False
        environ["wsgi.input"] = body
        answer = Answer(self._socket, environ, body, keep and not self._server.ending)
        answer.send(self._server.application)
        if not answer.keep:
            self._linger(body)
            return False
        while not body.done:
            body.read(_READ)
        if self._received.pending:
            gevent.sleep(0)  # a client that sends its requests at once must not starve the others
        return True

    def _invitation(self, environ: Environ) -> Any:
        """What invites the body of a client that waits for ``100 Continue``."""
        expected = environ.get("HTTP_EXPECT")
        if expected is None:
            return None
        if expected.lower() != "100-continue":
            raise Refused("The request expects what is not known here.", status=417)
        if environ["SERVER_PROTOCOL"] == "HTTP/1.0":
            return None
        return lambda: self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _refuse(self, refusal: Refused, environ: Environ) -> None:
        """Answer what is no request of ours, without its bytes in the log: a key may be there."""
        logger.info("refused what is no request: %s", refusal)
        self._socket.sendall(_last_answer(refusal, environ))
        self._linger(None)

    def _linger(self, body: Body | None) -> None:
        """Read away what the client is still sending, for a while."""
        if body is not None and body.done:
            return
        self._socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            if not self._socket.recv(_READ):
                return


class Answer:
    """One answer on its way out."""

    def __init__(self, sock: Any, environ: Environ, body: Body, keep: bool) -> None:
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
        except (Ended, OSError, GreenletExit):
            raise
        except Exception as fault:
            logger.error("the application failed", exc_info=fault)
            if not self._begun:
                error = GatewayError("The gateway failed; its log says more.")
                self._socket.sendall(_last_answer(error, self._environ))
            raise Ended from None
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
            if self._chunked or len(piece) <= _READ:
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


def _last_answer(error: GatewayError, environ: Environ) -> bytes:
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
    app.extensions["gateway"].proxy.cut_all()
