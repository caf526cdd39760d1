"""The counters of ``/debug/status`` and ``/debug/metrics``, added up over workers and machines."""

from __future__ import annotations

from gateway.observe.metrics import PREFIX, Metrics
from gateway.state import SharedStore, StoreError


def total_counters(metrics: Metrics, store: SharedStore) -> dict[str, float]:
    """The counters that machines share, summed up."""
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
    """This machine's counters, all its workers together, the dead ones too."""
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
