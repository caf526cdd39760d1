"""``GET /debug/status``: what is in flight and what ended last, over all workers."""

from __future__ import annotations

from typing import Any

from gateway.clock import CLOCKS, elapsed_ms, timestamp
from gateway.observe import total_counters
from gateway.state import StoreError

#: How many of the newest exchanges are shown.
RECENT = 10


def describe(parts: Any) -> dict[str, Any]:
    """The body of ``/debug/status``; ``status`` is ``error`` while the store is unavailable."""
    totals = _totals(parts)
    try:
        entries = in_flight(parts)
        recent = parts.store.latest("inference_complete", RECENT)
    except StoreError as error:
        failed = {"recentRequests": [], "error": error.message}
        return {**_current_state("error", [], parts), **failed, **totals}
    state = _current_state(_status(entries), entries, parts)
    return {**state, "recentRequests": recent, **totals}


def in_flight(parts: Any) -> list[dict[str, Any]]:
    """The operations in flight in all workers, oldest first. Raises :class:`StoreError`."""
    return [_shown(operation) for operation in parts.store.in_flight()]


def current_operation(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The oldest model load in flight, otherwise the oldest exchange."""
    loads = [entry for entry in entries if entry["operation"] == "model_load"]
    return next(iter(loads or entries), None)


def active_model(parts: Any) -> dict[str, Any] | None:
    """The active model under its names in the API, or None."""
    active = parts.store.active()
    if active is None:
        return None
    return {
        "modelKey": active.model_key,
        "instanceId": active.instance_id,
        "type": active.model_type,
        "defaultInference": active.default_inference,
    }


def _current_state(status: str, entries: list[dict[str, Any]], parts: Any) -> dict[str, Any]:
    return {
        "status": status,
        "currentOperation": current_operation(entries),
        "activeModel": active_model(parts),
        "inFlight": entries,
    }


def _status(entries: list[dict[str, Any]]) -> str:
    operations = {entry["operation"] for entry in entries}
    if "model_load" in operations:
        return "loading_model"
    return "processing_inference" if operations else "idle"


def _shown(operation: dict[str, Any]) -> dict[str, Any]:
    """An operation in flight as the API shows it: timestamp and elapsed time, no clock readings."""
    hidden = ("timestamp", *CLOCKS)
    shown = {name: value for name, value in operation.items() if name not in hidden}
    started = timestamp(operation["startedAt"])
    return {**shown, "startedAt": started, "elapsedMs": elapsed_ms(operation)}


def _totals(parts: Any) -> dict[str, int]:
    sums = total_counters(parts.metrics, parts.store)
    return {"totalRequests": int(sums["requests"]), "totalErrors": int(sums["errors"])}
