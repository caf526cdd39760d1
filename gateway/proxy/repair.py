"""Turns LM Studio's errors into those that clients of the dialect expect.

LM Studio responds to an unknown endpoint or a context overflow with status 200 and
``{"error": …}``, where ``error`` may be a string; a crash, or a proxy in front of LM Studio, may
send HTML.
"""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

from gateway.errors import GatewayError

#: Responses up to this size are searched for an error.
MAX_ERROR_BYTES = 65536

#: Content coding → zlib's ``wbits``.
_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_STARTS_WITH_ERROR = re.compile(rb'\s*\{\s*"(?:error|type"\s*:\s*"error)"')
_UNKNOWN_ENDPOINT = re.compile(r"unexpected endpoint or method", re.IGNORECASE)
#: Where text that is not shown begins or ends, and any other tag.
_HIDING = re.compile(r"<(/?)(?:style|script)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"<[^<>]*>")
#: What LM Studio's errors are known to say. Whatever else is in them may quote the request.
_KNOWN_WORDS = re.compile(
    "unexpected endpoint or method|no models? loaded|invalid model identifier|model not found"
    "|model (?:is |was )?unloaded|model does not exist|model has crashed|failed to load model"
    "|insufficient (?:system )?(?:resources|memory)|context (?:overflow|size has been exceeded)"
    "|(?:greater|longer|larger|more) than the context length|context length of [0-9]{1,9} tokens"
    "|channel error|too many requests|unexpected token|invalid request|field is required",
    re.IGNORECASE,
)
_CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class UpstreamError(GatewayError):
    """An error that LM Studio responded with. The client gets its words; events and the log get
    only what can't be a part of the request."""

    @property
    def report(self) -> str:
        words = _KNOWN_WORDS.search(self.message)
        known = f": {words[0]}" if words else ""
        code = self.code if _CODE.fullmatch(self.code) else "unknown code"
        return f"LM Studio responded with an error ({self.status} {code}){known}"


def starts_like_error(first: bytes) -> bool:
    """Whether a response with status 200 begins as an error body does."""
    return _STARTS_WITH_ERROR.match(first) is not None


def embedded_error(content: bytes, encoding: str | None = None) -> GatewayError | None:
    """Return the error in the body of a 200; None if there is none, or if the content coding is
    unknown."""
    decoded = content if encoding is None else decode(content, encoding)
    if decoded is None or b'"error"' not in decoded:
        return None
    parsed = _parse(decoded)
    if not isinstance(parsed, dict) or not parsed.get("error"):
        return None
    if "choices" in parsed or "data" in parsed or "id" in parsed or "object" in parsed:
        return None  # a regular response with an error member, such as a response object
    message, fields = _message_and_fields(parsed["error"])
    status = _status_in(parsed, fields)
    if status is None:
        status = 404 if _UNKNOWN_ENDPOINT.search(message) else 400
    return _error(message, status, fields)


def error_in(status: int, content: bytes) -> GatewayError | None:
    """Return the error that a complete response represents; None if it is not an error."""
    if status < 400:
        return embedded_error(content)
    parsed = _parse(content)
    inner = parsed.get("error", parsed.get("message")) if isinstance(parsed, dict) else None
    message, fields = _message_and_fields(inner) if inner else (_plain_text(content), {})
    return _error(message or f"LM Studio answered {status}.", status, fields)


def wrapped_error(
    status: int, content: bytes, encoding: str | None, dialect: str
) -> GatewayError | None:
    """Return the error to send in place of an upstream error body; None when the body is an error
    object of the dialect already, or its content coding is unknown."""
    decoded = decode(content, encoding)
    if decoded is None or _fits_dialect(_parse(decoded), dialect):
        return None
    return error_in(status, decoded)


def _fits_dialect(parsed: Any, dialect: str) -> bool:
    """Whether a parsed body is an error object of the dialect."""
    if not isinstance(parsed, dict) or not isinstance(parsed.get("error"), dict):
        return False
    if not isinstance(parsed["error"].get("message"), str):
        return False
    return dialect != "anthropic" or parsed.get("type") == "error"


def _error(message: str, status: int, fields: dict[str, Any]) -> GatewayError:
    code, param = fields.get("code"), fields.get("param")
    default = "unknown_endpoint" if status == 404 else "upstream_error"
    return UpstreamError(
        message,
        status=status,
        code=code if isinstance(code, str) else default,
        param=param if isinstance(param, str) else None,
    )


def _message_and_fields(error: Any) -> tuple[str, dict[str, Any]]:
    """Return the text and the fields of an ``error`` member, whatever its type."""
    if isinstance(error, dict):
        message = error.get("message") or error.get("error") or json.dumps(error)
        return str(message), error
    return str(error), {}


def _status_in(parsed: dict[str, Any], fields: dict[str, Any]) -> int | None:
    """Return the HTTP status that an error body itself names, under any of the usual names."""
    for source in (fields, parsed):
        for name in ("status", "statusCode", "status_code", "code"):
            value = source.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599:
                return value
    return None


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _plain_text(content: bytes) -> str:
    text = content.decode("utf-8", "replace")
    shown = []
    start, hidden = 0, False
    for tag in _HIDING.finditer(text):
        if not hidden:
            shown.append(text[start : tag.start()])
        start, hidden = tag.end(), not tag[1]
    if not hidden:
        shown.append(text[start:])
    return " ".join(_TAG.sub(" ", " ".join(shown)).split())[:2000]


def decode(content: bytes, coding: str | None) -> bytes | None:
    """Return the body without its content coding, cut behind :data:`MAX_ERROR_BYTES`; None if the
    coding is unknown or does not fit.

    A body that decodes to more is longer than that limit by a byte.
    """
    if coding is None or coding.lower() == "identity":
        return content
    window = _WINDOWS.get(coding.lower())
    if window is None:
        return None
    inflater = zlib.decompressobj(window)
    try:
        decoded = inflater.decompress(content, MAX_ERROR_BYTES + 1)
    except zlib.error:
        return None
    return decoded if inflater.eof or len(decoded) > MAX_ERROR_BYTES else None
