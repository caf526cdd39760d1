"""Formats server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

from typing import Any

from gateway.errors import Headers, dumps

#: Seconds of silence after which a stream gets a comment, again and again.
HEARTBEAT = 10.0
#: A comment, which clients ignore; it shows proxies on the way that the connection is alive.
KEEP_ALIVE = b": keep-alive\n\n"

CONTENT_TYPE = "text/event-stream; charset=utf-8"
#: Response headers that keep proxies from buffering or caching a stream.
UNBUFFERED: Headers = [("X-Accel-Buffering", "no"), ("Cache-Control", "no-cache")]


def event(name: str, data: bytes) -> bytes:
    """Format an event. ``data`` is a single line; an empty ``name`` means the default type."""
    head = b"event: %b\n" % name.encode() if name else b""
    return b"%bdata: %b\n\n" % (head, data)


def error_event(payload: dict[str, Any], *, named: bool = False) -> bytes:
    """Format an error, the last event of a stream; ``named`` adds ``event: error`` (Anthropic)."""
    return event("error" if named else "", dumps(payload))
