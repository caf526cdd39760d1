"""``GET /metrics``: the instruments of :mod:`gateway.observe.metrics`, for Prometheus."""

from __future__ import annotations

from flask import Blueprint, Response, current_app
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from gateway.debug.health import check_lmstudio

blueprint = Blueprint("metrics", __name__)


@blueprint.get("/metrics")
def metrics() -> Response:
    """All instruments in the text format of Prometheus."""
    parts = current_app.extensions["gateway"]
    text = parts.metrics.exposition(lambda: bool(check_lmstudio(parts)["connected"]))
    return Response(text, content_type=CONTENT_TYPE_LATEST)
