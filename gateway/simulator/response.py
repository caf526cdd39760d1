"""What the simulator sends: whole responses, and replies that are streamed event by event."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable
from typing import Any

from gateway.simulator.models import JsonObject

_JSON = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), default=lambda raw: b64encode(raw).decode()
)
#: A reply as a whole, and as server-sent events: the opening ones, the tokens, which are paced, and
#: the closing ones.
Reply = tuple[JsonObject, list[bytes], Iterable[bytes], list[bytes]]


class Response:
    """JSON, a text or a :data:`Reply` to be streamed; ``_`` in header names stands for ``-``."""

    def __init__(self, content: Any, status: int = 200, **headers: str) -> None:
        self.content, self.status = content, status
        self.headers = {name.replace("_", "-"): text for name, text in headers.items()}


def error_response(status: int, message: str, param: str | None = None, **more: str) -> Response:
    """Return an error object in OpenAI's form."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    return Response({"error": error | more}, status)


def encoded(content: Any) -> bytes:
    """Return JSON in UTF-8; bytes become base64, and a lone surrogate stays a JSON escape."""
    return _JSON.encode(content).encode(errors="backslashreplace")
