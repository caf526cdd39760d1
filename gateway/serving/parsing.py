"""Parses the head of an HTTP/1.1 request into a WSGI environ (RFC 9112).

The parser is strict: a head that two parties read differently can smuggle a request past one of
them.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote_to_bytes

from gateway.errors import GatewayError, MethodNotAllowed
from gateway.lmstudio import TOKEN, header_line
from gateway.request import is_authority, origin_form

Environ = dict[str, Any]
#: Bytes of the request line or of one header line.
MAX_LINE = 8190
#: Header lines of a request.
MAX_FIELDS = 100
#: Bytes of a whole head.
MAX_HEAD = 65536

_TOKEN = re.compile(TOKEN)
_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e]+) HTTP/1\.([01])")
_LENGTH = re.compile(r"[0-9]{1,18}")
#: Headers that must not be repeated: recipients disagree about which of the two counts.
SINGLE = frozenset({"CONTENT_LENGTH", "CONTENT_TYPE", "HTTP_HOST", "HTTP_TRANSFER_ENCODING"})

#: The results of :func:`header_field`, with the most that there are and the longest line.
_cache: dict[bytes, tuple[str, str]] = {}
_MAX_CACHED, _MAX_CACHED_LINE = 2048, 256
_NEVER_CACHED = frozenset(
    {"HTTP_AUTHORIZATION", "HTTP_PROXY_AUTHORIZATION", "HTTP_X_API_KEY", "HTTP_COOKIE"}
    | {"HTTP_X_FORWARDED_FOR", "HTTP_FORWARDED", "HTTP_X_REAL_IP", "HTTP_X_REQUEST_ID"}
)


class RequestRejected(GatewayError):
    """The request is malformed or not supported; its response is the last of the connection."""

    status, code = 400, "bad_request"


def parse(head: bytes, environ: Environ) -> tuple[bool, int | None]:
    """Parse a request's head into ``environ``.

    Returns whether the client wants to keep the connection alive, and the length of the body (None
    if it is chunked). Raises RequestRejected.
    """
    first, *lines = head.split(b"\r\n")
    found = _REQUEST_LINE.fullmatch(first)
    if found is None:
        raise RequestRejected("The request line is malformed.")
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
            raise RequestRejected("A header that must not be repeated is repeated.")
        elif key:
            environ[key] += ("; " if key == "HTTP_COOKIE" else ",") + value
    environ.pop("", None)
    _check_host(environ.get("HTTP_HOST"), old)
    connection = environ.get("HTTP_CONNECTION", "").lower()
    keep_alive = "keep-alive" in connection if old else "close" not in connection
    return keep_alive and method != "CONNECT", _length(environ, old)


def _path(method: str, target: str) -> tuple[str, str]:
    """Split a request target into PATH_INFO and QUERY_STRING."""
    if not target.startswith("/") and not (target == "*" and method == "OPTIONS"):
        if method == "CONNECT":
            raise RequestRejected(
                "CONNECT is not allowed.",
                status=MethodNotAllowed.status,
                code=MethodNotAllowed.code,
                headers=MethodNotAllowed.headers,
            )
        found = origin_form(target)
        if found is None:
            raise RequestRejected("The request target is malformed.")
        target = found
    path, _, query = target.partition("#")[0].partition("?")
    if "%" in path:
        path = unquote_to_bytes(path).decode("latin-1")
    return path or "/", query


def header_field(line: bytes) -> tuple[str, str]:
    """Parse a header line into its key in the environ and its value.

    The key is empty for a name with an underscore, which WSGI can't tell from one with a hyphen.
    The results are cached, because clients send most header lines again with every request; but
    neither long lines nor those with credentials or addresses.
    """
    field = _cache.get(line)
    if field is None:
        field = _parse_field(line)
        if len(line) <= _MAX_CACHED_LINE and field[0] not in _NEVER_CACHED:
            if len(_cache) >= _MAX_CACHED:
                _cache.clear()
            _cache[line] = field
    return field


def _parse_field(line: bytes) -> tuple[str, str]:
    if len(line) > MAX_LINE:
        raise RequestRejected("A header is too long.", status=431)
    found = header_line(line)
    if found is None:
        raise RequestRejected("A header is malformed.")
    name = found[0].upper()
    if "_" in name:
        return "", ""
    key = name.replace("-", "_")
    if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        key = "HTTP_" + key
    return key, found[1]


def _check_host(host: str | None, old: bool) -> None:
    """Reject a request whose ``Host`` is missing or malformed (RFC 9112 §3.2)."""
    if host is None:
        if not old:
            raise RequestRejected("The Host header is missing.")
    elif not is_authority(host):
        raise RequestRejected("The Host header is malformed.")


def _length(environ: Environ, old: bool) -> int | None:
    """The length of the body in bytes, None if it is chunked (RFC 9112 §6.3)."""
    length = environ.get("CONTENT_LENGTH")
    coding = environ.get("HTTP_TRANSFER_ENCODING")
    if coding is not None:
        if coding.lower() != "chunked":
            raise RequestRejected(
                "The only supported transfer coding is chunked.",
                status=501,
                code="unsupported_transfer_coding",
            )
        if length is not None or old:
            raise RequestRejected("The length of the body is ambiguous.")
        return None
    if length is None:
        return 0
    if not _LENGTH.fullmatch(length):
        raise RequestRejected("The Content-Length is malformed.")
    return int(length)


def check_first_line(line: bytes, *, complete: bool) -> None:
    """Reject the first line of a head, or its beginning, if it can't become a request line.

    A ``complete`` one is given without its LF. Raises RequestRejected.
    """
    if not _TOKEN.match(line) or (complete and not line.endswith(b"\r")):
        raise RequestRejected("This is not an HTTP request.")
    if complete and not _REQUEST_LINE.fullmatch(line[:-1]):
        raise RequestRejected("The request line is malformed.")
    if len(line) - complete > MAX_LINE:
        raise RequestRejected("The request line is too long.", status=414)
