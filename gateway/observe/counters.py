"""The counters of ``/debug/status`` and ``/debug/metrics``, summed over workers and machines."""

from __future__ import annotations

from gateway.observe.metrics import PREFIX, Metrics
from gateway.state import SharedStore, StoreError


def total_counters(metrics: Metrics, store: SharedStore) -> dict[str, float]:
    """The counters of all machines; only this machine's while the store is unavailable."""
    sums = own_counters(metrics)
    try:
        others = store.other_counters()
    except StoreError:
        others = []
    for other in others:
        for name, value in other.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def own_counters(metrics: Metrics) -> dict[str, float]:
    """The counters of this machine, summed over all its workers, dead ones included.

    An exchange that started, but neither ended nor is in flight, was lost with its worker and
    counts as an error.
    """
    totals = metrics.totals()

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
