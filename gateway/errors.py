"""The gateway's errors, and their bodies in each dialect.

Any code may raise a :class:`GatewayError`; :func:`response` turns it into a response in the dialect
of the request's path: ``admin`` (flat), ``openai`` or ``anthropic``.
"""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from typing import Any

Headers = list[tuple[str, str]]

#: Characters of an error's text in events and in the log.
MAX_REPORT = 200

_BRACKET = re.compile(r"[{\[]")
#: Quoted parts of a text; one that is not closed goes to the end of the text.
_QUOTED = re.compile(
    r'"(?:[^"\\]|\\.)*+(?:"|$|\\$)|`[^`]*+(?:`|$)|“[^”]*+(?:”|$)|«[^»]*+(?:»|$)'
    r"|(?<!\w)'(?:[^']|'(?=\w))*+(?:'|$)",
    re.DOTALL,
)

#: Shorthand paths: each is served as ``/v1`` + path.
SHORTHAND = frozenset(
    {
        "/chat/completions",
        "/completions",
        "/models",
        "/embeddings",
        "/responses",
        "/messages",
        "/images/generations",
        "/audio/transcriptions",
        "/audio/translations",
    }
)


class GatewayError(Exception):
    """The root of all errors that a client sees.

    ``status`` is the HTTP status, ``code`` OpenAI's machine-readable ``error.code``, ``param`` the
    member of the request that is wrong, ``details`` the admin dialect's list of
    ``{"path": [...], "message": ...}``.
    """

    status = 500
    code = "internal_error"
    #: Response headers of this kind of error.
    headers: Headers = []

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        details: list[dict[str, Any]] | None = None,
        headers: Headers | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.details = details
        if status is not None:
            self.status = status
        if code is not None:
            self.code = code
        if headers is not None:
            self.headers = headers

    @property
    def report(self) -> str:
        """What events and the log say of the error."""
        return self.message[:MAX_REPORT]


class InternalError(GatewayError):
    """A bug of the gateway. Clients learn nothing about it; the log has the traceback."""

    def __init__(self) -> None:
        super().__init__("The gateway failed. See its log for details.")


class BadRequest(GatewayError):
    status, code = 400, "invalid_request"


class Unauthorized(GatewayError):
    status, code = 401, "invalid_api_key"
    headers = [("WWW-Authenticate", "Bearer")]


class Forbidden(GatewayError):
    status, code = 403, "forbidden"


class NotFound(GatewayError):
    status, code = 404, "not_found"


class MethodNotAllowed(GatewayError):
    """The method is one that no path takes."""

    status, code = 405, "method_not_allowed"
    headers = [("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")]

    def __init__(self, method: str) -> None:
        super().__init__(f"{method} is not allowed.")


class RequestTimeout(GatewayError):
    status, code = 408, "request_timeout"


class Conflict(GatewayError):
    status, code = 409, "conflict"
    #: The OpenAI SDKs retry a 409, but a conflict in the gateway does not resolve itself.
    headers = [("x-should-retry", "false")]


class BodyTooLarge(GatewayError):
    status, code = 413, "body_too_large"


class UnsupportedMediaType(GatewayError):
    status, code = 415, "unsupported_media_type"


class BadGateway(GatewayError):
    status, code = 502, "bad_gateway"


class Unreachable(GatewayError):
    status, code = 503, "lmstudio_unreachable"
    headers = [("Retry-After", "5")]


class Overloaded(GatewayError):
    """A worker is at one of its limits. It queues nothing: the backlog of the listening socket
    bounds how many requests wait."""

    status, code = 503, "overloaded"
    headers = [("Retry-After", "1")]


class UpstreamTimeout(GatewayError):
    status, code = 504, "upstream_timeout"


def without_quotes(text: str) -> str:
    """Return the beginning of a foreign text for events and the log, without its quoted parts and
    what follows a bracket, which may hold anything."""
    plain = _BRACKET.split(text[: 10 * MAX_REPORT], maxsplit=1)[0]
    return " ".join(_QUOTED.sub("", plain).split())[:MAX_REPORT].rstrip()


def dialect_of(path: str) -> str:
    """The error dialect of a request path; a shorthand has that of its ``/v1`` path."""
    if path in ("/v1/messages", "/messages") or path.startswith("/v1/messages/"):
        return "anthropic"
    if path.startswith(("/v1/", "/api/", "/models/")) or path in ("/v1", "/api"):
        return "openai"
    return "openai" if path in SHORTHAND else "admin"


def body(error: GatewayError, dialect: str, request_id: str) -> bytes:
    """The JSON body of an error, in a dialect."""
    return dumps(payload(error.message, error.status, error.code, dialect, request_id, error))


def payload(
    message: str,
    status: int,
    code: str | None,
    dialect: str,
    request_id: str = "",
    error: GatewayError | None = None,
) -> dict[str, Any]:
    """The error body of a dialect, not yet serialized."""
    if dialect == "anthropic":
        return {"type": "error", "error": {"type": _anthropic_type(status), "message": message}}
    if dialect == "openai":
        param = error.param if error else None
        kind = _openai_type(status)
        return {"error": {"message": message, "type": kind, "param": param, "code": code}}
    flat: dict[str, Any] = {"error": message}
    if error is not None and error.details:
        flat["details"] = error.details
    flat["requestId"] = request_id
    return flat


def response(
    error: GatewayError, path: str, request_id: str, *, method: str = "GET"
) -> tuple[str, Headers, bytes]:
    """Status line, headers and body of an error, with every header except ``X-Request-Id``."""
    content = body(error, dialect_of(path), request_id)
    headers = [
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(content))),
        *error.headers,
    ]
    return status_line(error.status), headers, b"" if method == "HEAD" else content


def status_line(status: int) -> str:
    """``404`` → ``404 Not Found``; a status without a registered phrase is ``Unknown``."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"{status} Unknown"


def dumps(value: Any) -> bytes:
    """Serialize to compact UTF-8 JSON, the form of all bodies and events of the gateway."""
    text = _encode(value)
    # UTF-8 can't encode a lone surrogate, which clients may send as an escape: keep it escaped
    return text.encode("utf-8", "backslashreplace")


def loads(text: str | bytes) -> Any:
    """Parse JSON strictly: ValueError also for ``NaN`` and ``Infinity``, which Python accepts."""
    return json.loads(text, parse_constant=reject_constant)


def reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _openai_type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 403:
        return "permission_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def _anthropic_type(status: int) -> str:
    named = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
        504: "timeout_error",
    }
    return named.get(status, "api_error" if status >= 500 else "invalid_request_error")
