"""The head of an HTTP/1.1 request, parsed into a WSGI environ (RFC 9112).

The parser is strict: what two parties read differently can be smuggled past one of them.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes

from gateway.errors import GatewayError
from gateway.lmstudio import HEADER_LINE, TOKEN

Environ = dict[str, Any]
#: Bytes of a line, header lines of a request, bytes of a whole head.
MAX_LINE = 8190
MAX_FIELDS = 100
MAX_HEAD = 65536

_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e]+) HTTP/1\.([01])")
_ABSOLUTE = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#\[\]]*|\[[0-9A-Fa-f:.]+\](?::\d*)?)(?=[/?#]|$)"
)
_LENGTH = re.compile(r"[0-9]{1,18}")
#: What can be there once only; of two, it is not clear who means which.
SINGLE = frozenset({"CONTENT_LENGTH", "CONTENT_TYPE", "HTTP_HOST", "HTTP_TRANSFER_ENCODING"})


class RequestRejected(GatewayError):
    """What came is no request that can be served; the connection ends with the answer."""

    status, code = 400, "bad_request"


def parse(head: bytes, environ: Environ) -> tuple[bool, int | None]:
    """Put a request's head into a WSGI environ.

    Returns whether the client wants to keep the connection, and the length of the body (None: it
    comes in chunks). Raises RequestRejected.
    """
    first, *lines = head.split(b"\r\n")
    found = _REQUEST_LINE.fullmatch(first)
    if found is None:
        raise RequestRejected("The request line is not acceptable.")
    if len(first) > MAX_LINE:
        raise RequestRejected("The request line is too long.", status=414)
    target = found[2].decode("ascii")
    environ["REQUEST_METHOD"] = method = found[1].decode("ascii")
    environ["RAW_URI"] = target
    environ["PATH_INFO"], environ["QUERY_STRING"] = _path(method, target)
    old = found[3] == b"0"
    environ["SERVER_PROTOCOL"] = "HTTP/1.0" if old else "HTTP/1.1"
    if len(lines) > MAX_FIELDS:
        raise RequestRejected("The request has too many headers.", status=431)
    for line in lines:
        key, value = header_field(line)
        if key not in environ:
            environ[key] = value
        elif key in SINGLE:
            raise RequestRejected("A header is there twice that can be there only once.")
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
            raise RequestRejected("The request's target is not acceptable.")
    path, _, query = target.partition("#")[0].partition("?")
    if "%" in path:
        path = unquote_to_bytes(path).decode("latin-1")
    return path or "/", query


@lru_cache(maxsize=2048)
def header_field(line: bytes) -> tuple[str, str]:
    """A header line's key in the environ and its value; clients repeat most of them every time.

    The key is empty for a name with an underscore, which WSGI can't tell from one with a hyphen.
    """
    if len(line) > MAX_LINE:
        raise RequestRejected("A header is too long.", status=431)
    found = HEADER_LINE.fullmatch(line)
    if found is None:
        raise RequestRejected("A header is not acceptable.")
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
            raise RequestRejected(
                "Bodies can be chunked, but have no other transfer coding.",
                status=501,
                code="unsupported_transfer_coding",
            )
        if length is not None or old:
            raise RequestRejected("The length of the body is not clear.")
        return None
    if length is None:
        return 0
    if not _LENGTH.fullmatch(length):
        raise RequestRejected("The Content-Length is not acceptable.")
    return int(length)


def check_beginning(data: bytes) -> None:
    """Refuse what can't become a head, before all of it has come (if it ever does)."""
    first, line_end, _ = data.partition(b"\r\n")
    if line_end and not _REQUEST_LINE.fullmatch(first):
        raise RequestRejected("The request line is not acceptable.")
    if b"\n" in first or not first or not re.match(TOKEN, first):
        raise RequestRejected("This is no HTTP request.")
    if len(first) > MAX_LINE:
        raise RequestRejected("The request line is too long.", status=414)
    if len(data) > MAX_HEAD:
        raise RequestRejected("The request's head is too large.", status=431)
