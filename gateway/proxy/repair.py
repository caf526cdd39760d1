"""LM Studio's errors, made what a client of the dialect expects.

LM Studio answers an unknown endpoint or a context overflow with status 200 and ``{"error": …}``,
its ``error`` may be a string, and a proxy or a crash may send HTML (``lmstudio.md`` §3).
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from typing import Any

from gateway.errors import GatewayError

#: Answers up to this size are looked at for an error inside.
MAX_ERROR_BYTES = 65536

_STARTS_WITH_ERROR = re.compile(rb'\s*\{\s*"(?:error|type"\s*:\s*"error)"')
_UNKNOWN_ENDPOINT = re.compile(r"unexpected endpoint or method", re.IGNORECASE)
_TAGS = re.compile(r"<(?:style|script)\b.*?</(?:style|script)>|<[^>]*>", re.DOTALL | re.IGNORECASE)


def starts_like_error(first: bytes) -> bool:
    """Whether the beginning of a 200 answer promises an error inside."""
    return _STARTS_WITH_ERROR.match(first) is not None


def hidden_error(content: bytes, encoding: str | None = None) -> GatewayError | None:
    """The error inside a 200 answer, or None if it is a good answer."""
    decoded = content if encoding is None else _decode(content, encoding)
    if decoded is None or b'"error"' not in decoded:
        return None
    parsed = _parse(decoded)
    if not isinstance(parsed, dict) or not parsed.get("error"):
        return None
    if "choices" in parsed or "data" in parsed or "id" in parsed or "object" in parsed:
        return None  # an answer that merely has an error member (a response object, say)
    message, fields = _words(parsed["error"])
    status = _status(parsed, fields)
    if status is None:
        status = 404 if _UNKNOWN_ENDPOINT.search(message) else 400
    return _error(message, status, fields)


def as_error(status: int, content: bytes) -> GatewayError | None:
    """An answer that must be told in a stream: the error in it, None if it is a good answer."""
    if status < 400:
        return hidden_error(content)
    parsed = _parse(content)
    inner = parsed.get("error", parsed.get("message")) if isinstance(parsed, dict) else None
    message, fields = _words(inner) if inner else (_plain_text(content), {})
    return _error(message or f"LM Studio answered {status}.", status, fields)


def wrapped(status: int, content: bytes, encoding: str | None, spoken: str) -> GatewayError | None:
    """The error to tell instead of an upstream error body; None when the body is fine as it is."""
    decoded = _decode(content, encoding)
    if decoded is None or _speaks(_parse(decoded), spoken):
        return None
    return as_error(status, decoded)


def _speaks(parsed: Any, spoken: str) -> bool:
    """Whether a parsed body is an error object of the dialect."""
    if not isinstance(parsed, dict) or not isinstance(parsed.get("error"), dict):
        return False
    if not isinstance(parsed["error"].get("message"), str):
        return False
    return spoken != "anthropic" or parsed.get("type") == "error"


def _error(message: str, status: int, fields: dict[str, Any]) -> GatewayError:
    code, param = fields.get("code"), fields.get("param")
    default = "unknown_endpoint" if status == 404 else "upstream_error"
    return GatewayError(
        message,
        status=status,
        code=code if isinstance(code, str) else default,
        param=param if isinstance(param, str) else None,
    )


def _words(error: Any) -> tuple[str, dict[str, Any]]:
    """The text and the fields of an ``error`` member, whatever its form."""
    if isinstance(error, dict):
        message = error.get("message") or error.get("error") or json.dumps(error)
        return str(message), error
    return str(error), {}


def _status(parsed: dict[str, Any], fields: dict[str, Any]) -> int | None:
    """The status that an error body itself names."""
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
    text = _TAGS.sub(" ", content.decode("utf-8", "replace"))
    return " ".join(text.split())[:2000]


def _decode(content: bytes, encoding: str | None) -> bytes | None:
    """The body without its content coding; None for one that is not understood."""
    if encoding is None or encoding.lower() == "identity":
        return content
    try:
        if encoding.lower() in ("gzip", "x-gzip"):
            return gzip.decompress(content)
        if encoding.lower() == "deflate":
            return zlib.decompress(content)
    except (OSError, EOFError, zlib.error):
        return None
    return None
