"""The counters of ``/debug/status`` and ``/debug/metrics``, summed over workers and machines."""

from __future__ import annotations

from gateway.observe.metrics import Metrics
from gateway.state import SharedStore, StoreError


def total_counters(metrics: Metrics, store: SharedStore) -> dict[str, float]:
    """The counters of all machines; only this machine's while the store is unavailable."""
    sums = metrics.totals()
    try:
        others = store.other_counters()
    except StoreError:
        others = []
    for other in others:
        for name, value in other.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums
