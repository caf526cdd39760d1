"""``/health`` and ``/health/ready``: whether LM Studio and the shared state respond."""

from __future__ import annotations

import time
from typing import Any

import gevent
from flask import Blueprint, current_app

from gateway import version
from gateway.clock import timestamp
from gateway.errors import GatewayError
from gateway.state import StoreError

#: Seconds within which LM Studio and the shared state must respond. ``/health`` itself must respond
#: within one second.
CHECK_TIMEOUT = 0.7

blueprint = Blueprint("health", __name__)


@blueprint.get("/health")
def health() -> dict[str, Any]:
    """Always 200, because the gateway itself is up; ``status`` is ``ok`` or ``degraded``."""
    parts = current_app.extensions["gateway"]
    state = gevent.spawn(_check_state, parts)
    lmstudio = check_lmstudio(parts)
    state.join()
    healthy = lmstudio["connected"] and state.value["connected"]
    return {
        "status": "ok" if healthy else "degraded",
        "timestamp": timestamp(time.time()),
        "uptime": round(time.monotonic() - parts.started, 3),
        "version": version.__version__,
        "commit": version.commit(),
        "lmstudio": lmstudio,
        "state": state.value,
    }


@blueprint.get("/health/ready")
def ready() -> tuple[Any, ...]:
    """200 if inference requests can be served now, otherwise 503."""
    lmstudio = check_lmstudio(current_app.extensions["gateway"])
    connected = lmstudio["connected"]
    body = {"ready": connected, "lmstudio": lmstudio}
    return (body, 200) if connected else (body, 503, {"Retry-After": "5"})


def check_lmstudio(parts: Any) -> dict[str, Any]:
    """``{"connected": bool, "error"?: str}``, within CHECK_TIMEOUT seconds."""
    try:
        parts.upstream.greet(CHECK_TIMEOUT)
    except GatewayError as error:
        return {"connected": False, "error": error.message}
    return {"connected": True}


def _check_state(parts: Any) -> dict[str, Any]:
    try:
        with gevent.Timeout(CHECK_TIMEOUT, StoreError("The shared state does not respond.")):
            parts.store.ping()
    except GatewayError as error:
        return {"connected": False, "error": error.message}
    if parts.events.store_error:  # the store responds, but rejects writes
        return {"connected": False, "error": parts.events.store_error}
    return {"connected": True}
