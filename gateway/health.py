"""``/health`` and ``/health/ready``: whether the gateway and LM Studio are there."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from flask import Blueprint, Response, current_app

from gateway import __version__
from gateway.errors import GatewayError, dumps

#: Seconds within which LM Studio must show a sign of life; the contract gives /health one second.
GREETING_TIMEOUT = 0.7

blueprint = Blueprint("health", __name__)


@blueprint.get("/health")
def health() -> Response:
    """200 with ``status`` ``ok`` or ``degraded``: the gateway itself answers."""
    lmstudio = _lmstudio()
    return _json(
        200,
        {
            "status": "ok" if lmstudio["connected"] else "degraded",
            "timestamp": datetime.now(UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "uptime": round(time.time() - current_app.extensions["gateway"].started, 3),
            "version": __version__,
            "lmstudio": lmstudio,
        },
    )


@blueprint.get("/health/ready")
def ready() -> Response:
    """200 when a request could be served now, else 503."""
    lmstudio = _lmstudio()
    answer = _json(
        200 if lmstudio["connected"] else 503,
        {"ready": lmstudio["connected"], "lmstudio": lmstudio},
    )
    if not lmstudio["connected"]:
        answer.headers["Retry-After"] = "5"
    return answer


def _lmstudio() -> dict[str, Any]:
    try:
        current_app.extensions["gateway"].upstream.greet(GREETING_TIMEOUT)
    except GatewayError as error:
        return {"connected": False, "error": error.message}
    return {"connected": True}


def _json(status: int, value: dict[str, Any]) -> Response:
    return Response(dumps(value), status, content_type="application/json")
