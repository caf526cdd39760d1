"""The blueprint of ``/debug``: dashboard, event stream, status and metrics."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, current_app, request

from gateway import sse
from gateway.debug import performance
from gateway.debug.dashboard import dashboard
from gateway.debug.status import describe
from gateway.debug.stream import EventStream
from gateway.errors import BadRequest
from gateway.observe import TYPES

blueprint = Blueprint("debug", __name__, url_prefix="/debug")


@blueprint.get("/")
def show_dashboard() -> Response:
    """The dashboard, which needs no key to load; it asks for one to fetch its data."""
    if not request.path.endswith("/"):
        # a relative URL keeps the path prefix of a proxy
        return Response(status=308, headers={"Location": "debug/"})
    content, headers = dashboard()
    return Response(content, headers=headers)


@blueprint.get("/stream")
def stream() -> Response:
    """Every event of every worker as server-sent events."""
    parts = current_app.extensions["gateway"]
    frames = parts.events.subscribe(_last_event_id(), _types())
    body = EventStream(frames, request.environ, parts.metrics, parts.event_streams)
    return Response(body, content_type=sse.CONTENT_TYPE, headers=sse.UNBUFFERED)


@blueprint.get("/status")
def status() -> dict[str, Any]:
    """What is in flight and what ended last, over all workers."""
    return describe(current_app.extensions["gateway"])


@blueprint.get("/metrics")
def metrics() -> dict[str, Any]:
    """Counters and averages as JSON; ``/metrics`` is the counterpart for Prometheus."""
    return performance.describe(current_app.extensions["gateway"])


def _last_event_id() -> int | None:
    text = request.headers.get("Last-Event-ID") or request.args.get("lastEventId") or ""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _types() -> frozenset[str]:
    types = frozenset(name.strip() for name in request.args.get("types", "").split(",") if name)
    unknown = types - set(TYPES)
    if unknown:
        raise BadRequest(f"Unknown event type {min(unknown)!r}. Known: {', '.join(TYPES)}.")
    return types
