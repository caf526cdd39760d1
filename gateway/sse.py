"""Server-sent events as the gateway writes them (WHATWG HTML, section 9.2)."""

from __future__ import annotations

from typing import Any

from gateway.errors import Headers, dumps

#: Seconds of silence after which a stream gets a comment, and between two comments.
HEARTBEAT = 10.0
#: A comment: clients skip it, proxies on the way see that the connection is alive.
KEEP_ALIVE = b": keep-alive\n\n"

CONTENT_TYPE = "text/event-stream; charset=utf-8"
#: What keeps proxies and caches from holding a stream back.
UNBUFFERED: Headers = [("X-Accel-Buffering", "no"), ("Cache-Control", "no-cache")]


def event(name: str, data: bytes) -> bytes:
    """One event; ``data`` is a single line. An empty ``name`` leaves the type to its default."""
    head = b"event: %b\n" % name.encode() if name else b""
    return b"%bdata: %b\n\n" % (head, data)


def error_event(payload: dict[str, Any], *, named: bool = False) -> bytes:
    """An error as the last event of a stream; ``named`` adds ``event: error`` (Anthropic)."""
    return event("error" if named else "", dumps(payload))
