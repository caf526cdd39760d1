"""``GET /debug/metrics``: counters and averages as JSON."""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path
from typing import Any

from gateway.debug.status import active_model, current_operation, in_flight
from gateway.observe import total_counters

#: How many of the newest exchanges the averages and percentiles cover.
RECENT = 1000


def describe(parts: Any) -> dict[str, Any]:
    """The body of ``/debug/metrics``. Raises :class:`StoreError`."""
    recent = parts.store.latest("inference_complete", RECENT)
    return {
        "modelInfo": active_model(parts),
        "performance": _performance(parts, recent),
        "recentActivity": {"last10Requests": recent[:10]},
        "system": _system(parts),
        "currentOperation": current_operation(in_flight(parts)),
    }


def _performance(parts: Any, recent: list[dict[str, Any]]) -> dict[str, Any]:
    sums = total_counters(parts.metrics, parts.store)
    times = [entry["totalTimeMs"] for entry in recent]
    requests, errors = int(sums["requests"]), int(sums["errors"])
    prompt, completion = int(sums["promptTokens"]), int(sums["completionTokens"])
    with_tokens = int(sums["withTokens"])
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
        "requestsWithTokenData": with_tokens,
        "tokenStats": {
            "promptTokens": prompt,
            "completionTokens": completion,
            "totalTokens": prompt + completion,
            "avgPromptTokens": round(prompt / with_tokens, 1) if with_tokens else None,
            "avgCompletionTokens": round(completion / with_tokens, 1) if with_tokens else None,
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
        "workers": parts.metrics.workers,
    }


def _resident_bytes() -> int | None:
    """The memory of this worker in bytes; None on Windows."""
    try:
        # a module that only Unix has
        import resource
    except ImportError:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        # macOS has no /proc; it reports the peak, in bytes
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


def _percentile(values: list[float], fraction: float) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]
