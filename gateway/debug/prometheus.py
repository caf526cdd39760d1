"""``GET /metrics``: the instruments of :mod:`gateway.observe.metrics` for Prometheus."""

from __future__ import annotations

from flask import Blueprint, Response, current_app
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from gateway.debug.health import SIGN_TIMEOUT
from gateway.errors import GatewayError

blueprint = Blueprint("metrics", __name__)


@blueprint.get("/metrics")
def metrics() -> Response:
    """Every instrument, in Prometheus' text format."""
    parts = current_app.extensions["gateway"]

    def upstream_up() -> bool:
        try:
            parts.upstream.greet(SIGN_TIMEOUT)
        except GatewayError:
            return False
        return True

    return Response(parts.metrics.exposition(upstream_up), content_type=CONTENT_TYPE_LATEST)
