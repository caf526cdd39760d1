"""``GET /debug/status``: what runs now and what ran last, over all workers."""

from __future__ import annotations

from typing import Any

from gateway.clock import CLOCKS, elapsed_ms, timestamp
from gateway.observe import total_counters
from gateway.state import StoreError

#: How many of the newest exchanges are shown.
RECENT = 10


def describe(parts: Any) -> dict[str, Any]:
    """The answer of ``/debug/status``; ``status`` is ``error`` while the state can't be read."""
    totals = _totals(parts)
    try:
        entries = [running(entry) for entry in parts.store.in_flight()]
        recent = parts.store.latest("inference_complete", RECENT)
        state = _state(entries)
    except StoreError as error:
        entries, recent = [], []
        return {
            **_head("error", entries, parts),
            "recentRequests": recent,
            "error": error.message,
            **totals,
        }
    return {**_head(state, entries, parts), "recentRequests": recent, **totals}


def _head(state: str, running: list[dict[str, Any]], parts: Any) -> dict[str, Any]:
    return {
        "status": state,
        "currentOperation": current(running),
        "activeModel": active(parts),
        "inFlight": running,
    }


def _state(running: list[dict[str, Any]]) -> str:
    kinds = {entry["operation"] for entry in running}
    if "model_load" in kinds:
        return "loading_model"
    return "processing_inference" if kinds else "idle"


def current(running: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The oldest load, else the oldest exchange."""
    loads = [entry for entry in running if entry["operation"] == "model_load"]
    return next(iter(loads or running), None)


def running(entry: dict[str, Any]) -> dict[str, Any]:
    """What /debug/status shows of something that runs."""
    hidden = ("timestamp", *CLOCKS)
    shown = {name: value for name, value in entry.items() if name not in hidden}
    started = timestamp(entry["startedAt"])
    return {**shown, "startedAt": started, "elapsedMs": elapsed_ms(entry)}


def active(parts: Any) -> dict[str, Any] | None:
    active = parts.store.active()
    if active is None:
        return None
    return {
        "modelKey": active.model_key,
        "instanceId": active.instance_id,
        "type": active.model_type,
        "defaultInference": active.default_inference,
    }


def _totals(parts: Any) -> dict[str, int]:
    """``totalRequests`` and ``totalErrors`` of all workers and machines. Exchanges that neither
    ended nor run in a living worker were lost with theirs: they count as errors."""
    sums = total_counters(parts.metrics, parts.store)
    return {"totalRequests": int(sums["requests"]), "totalErrors": int(sums["errors"])}
