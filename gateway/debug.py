"""``/debug``: the page for looking, the event stream, and what the gateway does now, over all
workers."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, current_app, request

from gateway import cancellation, events
from gateway.errors import BadRequest, dumps
from gateway.metrics import PREFIX, Metrics
from gateway.page import page
from gateway.sse import KEEP_ALIVE
from gateway.store import StoreError

#: How many of the newest exchanges averages and percentiles are of.
RECENT = 1000

blueprint = Blueprint("debug", __name__, url_prefix="/debug")


@blueprint.get("/")
def look() -> Response:
    """The page for looking, which asks for the key itself; ``/debug`` leads to it."""
    if not request.path.endswith("/"):
        # relative, so that a proxy's prefix stays
        return Response(status=308, headers={"Location": "debug/"})
    content, headers = page()
    return Response(content, headers=headers)


@blueprint.get("/stream")
def stream() -> Response:
    """Every event of every worker as server-sent events."""
    parts = current_app.extensions["gateway"]
    frames = parts.events.subscribe(_last_event_id(), _types())
    watch = cancellation.watch(request.environ, frames.end)
    parts.metrics.subscribers.inc()
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
    body = _Body(frames, watch, parts.metrics)
    return Response(body, content_type="text/event-stream; charset=utf-8", headers=headers)


@blueprint.get("/status")
def status() -> Response:
    """What runs now and what ran last."""
    parts = current_app.extensions["gateway"]
    totals = _totals(parts)
    try:
        running = [_running(entry) for entry in parts.store.in_flight()]
        recent = parts.store.latest("inference_complete", 10)
        state = _state(running)
    except StoreError as error:
        running, recent, state = [], [], "error"
        return _json({**_head(state, running, parts), "error": error.message, **totals})
    return _json({**_head(state, running, parts), "recentRequests": recent, **totals})


@blueprint.get("/metrics")
def metrics() -> Response:
    """Counters and averages as JSON; ``/metrics`` has them for Prometheus."""
    parts = current_app.extensions["gateway"]
    recent = parts.store.latest("inference_complete", RECENT)
    running = [_running(entry) for entry in parts.store.in_flight()]
    return _json(
        {
            "modelInfo": _active(parts),
            "performance": _performance(parts, recent),
            "recentActivity": {"last10Requests": recent[:10]},
            "system": _system(parts),
            "currentOperation": _current(running),
        }
    )


class _Body(Iterator[bytes]):
    """A reader's stream: frames, and comments where nothing happens."""

    def __init__(
        self,
        frames: events.Subscription,
        watch: cancellation.ClientWatch | None,
        metrics: Metrics,
    ) -> None:
        self._frames = frames
        self._watch = watch
        self._metrics = metrics
        self._open = True

    def __next__(self) -> bytes:
        frame = next(self._frames)
        return KEEP_ALIVE if frame is None else frame

    def close(self) -> None:
        if self._open:
            self._open = False
            self._metrics.subscribers.dec()
            self._frames.close()
            if self._watch is not None:
                self._watch.stop()


def _last_event_id() -> int | None:
    text = request.headers.get("Last-Event-ID") or request.args.get("lastEventId") or ""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _types() -> frozenset[str]:
    asked = frozenset(name.strip() for name in request.args.get("types", "").split(",") if name)
    unknown = asked - set(events.TYPES)
    if unknown:
        raise BadRequest(f"Unknown event type {min(unknown)!r}. Known: {', '.join(events.TYPES)}.")
    return asked


def _head(state: str, running: list[dict[str, Any]], parts: Any) -> dict[str, Any]:
    return {
        "status": state,
        "currentOperation": _current(running),
        "activeModel": _active(parts),
        "inFlight": running,
    }


def _state(running: list[dict[str, Any]]) -> str:
    kinds = {entry["operation"] for entry in running}
    if "model_load" in kinds:
        return "loading_model"
    return "processing_inference" if kinds else "idle"


def _current(running: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The oldest load, else the oldest exchange."""
    loads = [entry for entry in running if entry["operation"] == "model_load"]
    return next(iter(loads or running), None)


def _running(entry: dict[str, Any]) -> dict[str, Any]:
    """What /debug/status shows of something that runs."""
    hidden = ("timestamp", *events.CLOCKS)
    shown = {name: value for name, value in entry.items() if name not in hidden}
    started = events.timestamp(entry["startedAt"])
    return {**shown, "startedAt": started, "elapsedMs": events.elapsed_ms(entry)}


def _active(parts: Any) -> dict[str, Any] | None:
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
    sums = counters(parts)
    return {"totalRequests": int(sums["requests"]), "totalErrors": int(sums["errors"])}


def counters(parts: Any) -> dict[str, float]:
    """The counters that machines share, summed up."""
    sums = own_counters(parts)
    try:
        others = parts.store.other_counters()
    except StoreError:
        others = []
    for other in others:
        for name, value in other.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def own_counters(parts: Any) -> dict[str, float]:
    """This machine's counters, all its workers together, the dead ones too."""
    totals = parts.metrics.totals()

    def total(name: str) -> float:
        return float(totals.get(f"{PREFIX}_{name}", 0.0))

    lost = total("requests_started_total") - total("requests_total") - total("requests_in_flight")
    return {
        "requests": total("requests_started_total"),
        "errors": total("request_errors_total") + max(0.0, lost),
        "completed": total("requests_total"),
        "withTokens": total("requests_with_tokens_total"),
        "promptTokens": total("tokens_total|input"),
        "completionTokens": total("tokens_total|output"),
    }


def _performance(parts: Any, recent: list[dict[str, Any]]) -> dict[str, Any]:
    sums = counters(parts)
    times = [entry["totalTimeMs"] for entry in recent]
    requests, errors = int(sums["requests"]), int(sums["errors"])
    prompt, completion = int(sums["promptTokens"]), int(sums["completionTokens"])
    told = int(sums["withTokens"])
    return {
        "totalRequests": requests,
        "totalErrors": errors,
        "errorRate": round(errors / requests, 4) if requests else 0,
        "recentRequestCount": len(recent),
        "completedRequestCount": int(sums["completed"]),
        "avgResponseTimeMs": _mean(times),
        "minResponseTimeMs": min(times, default=None),
        "maxResponseTimeMs": max(times, default=None),
        "medianResponseTimeMs": round(statistics.median(times), 1) if times else None,
        "p95ResponseTimeMs": _percentile(times, 0.95),
        "avgTtftMs": _mean([e["ttftMs"] for e in recent if e["ttftMs"] is not None]),
        "avgTokensPerSec": _mean([e["tokensPerSec"] for e in recent if e["tokensPerSec"]]),
        "totalTokensProcessed": prompt + completion,
        "requestsWithTokenData": told,
        "tokenStats": {
            "promptTokens": prompt,
            "completionTokens": completion,
            "totalTokens": prompt + completion,
            "avgPromptTokens": round(prompt / told, 1) if told else None,
            "avgCompletionTokens": round(completion / told, 1) if told else None,
        },
    }


def _system(parts: Any) -> dict[str, Any]:
    uptime = time.monotonic() - parts.started
    return {
        "uptime": round(uptime, 3),
        "uptimeFormatted": _duration(uptime),
        "memoryUsage": {"rss": _resident_bytes()},
        "pythonVersion": platform.python_version(),
        "platform": platform.platform(),
        "workers": _workers(),
    }


def _workers() -> int:
    """The worker processes of this machine: gunicorn's children, else this process alone."""
    try:
        parent = os.getppid()
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return 1
    return max(1, len(children)) if os.environ.get("PROMETHEUS_MULTIPROC_DIR") else 1


def _resident_bytes() -> int | None:
    """None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        # the highest ever, where there is no /proc: macOS, which counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize()


def _duration(seconds: float) -> str:
    """``1d 2h 3m 4s`` without leading zeros."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (rest, "s")]
    while len(parts) > 1 and not parts[0][0]:
        parts.pop(0)
    return " ".join(f"{count}{unit}" for count, unit in parts)


def _mean(values: list[float]) -> float | None:
    return round(statistics.fmean(values), 1) if values else None


def _percentile(values: list[float], share: float) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _json(value: Any) -> Response:
    return Response(dumps(value), content_type="application/json")
