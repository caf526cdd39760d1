"""``/health`` and ``/health/ready``: whether the gateway and LM Studio are there."""

from __future__ import annotations

import time
from typing import Any

import gevent
from flask import Blueprint, current_app

from gateway import version
from gateway.clock import timestamp
from gateway.errors import GatewayError
from gateway.state import StoreError

#: Seconds within which LM Studio and the state must show a sign of life; the contract gives
#: ``/health`` one second.
SIGN_TIMEOUT = 0.7

blueprint = Blueprint("health", __name__)


@blueprint.get("/health")
def health() -> dict[str, Any]:
    """200 with ``status`` ``ok`` or ``degraded``: the gateway itself answers."""
    parts = current_app.extensions["gateway"]
    state = gevent.spawn(_state, parts)
    lmstudio = _lmstudio(parts)
    state.join()
    well = lmstudio["connected"] and state.value["connected"]
    return {
        "status": "ok" if well else "degraded",
        "timestamp": timestamp(time.time()),
        "uptime": round(time.monotonic() - parts.started, 3),
        "version": version.__version__,
        "commit": version.commit(),
        "lmstudio": lmstudio,
        "state": state.value,
    }


@blueprint.get("/health/ready")
def ready() -> tuple[Any, ...]:
    """200 when a request could be served now, else 503."""
    lmstudio = _lmstudio(current_app.extensions["gateway"])
    connected = lmstudio["connected"]
    answer = {"ready": connected, "lmstudio": lmstudio}
    return (answer, 200) if connected else (answer, 503, {"Retry-After": "5"})


def _lmstudio(parts: Any) -> dict[str, Any]:
    try:
        parts.upstream.greet(SIGN_TIMEOUT)
    except GatewayError as error:
        return {"connected": False, "error": error.message}
    return {"connected": True}


def _state(parts: Any) -> dict[str, Any]:
    try:
        with gevent.Timeout(SIGN_TIMEOUT, StoreError("The shared state does not answer.")):
            parts.store.ping()
    except GatewayError as error:
        return {"connected": False, "error": error.message}
    if parts.events.store_error:  # it can be read, but not written
        return {"connected": False, "error": parts.events.store_error}
    return {"connected": True}
