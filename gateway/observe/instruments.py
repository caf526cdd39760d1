"""Counters, gauges and histograms, whose numbers are cells of a page (:mod:`.pages`).

Prometheus' own client keeps the numbers of several processes in files, for which there is no safe
place. Its exposition is used all the same: an instrument turns the sums of all pages into the
client's metric families.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate
from typing import TypeVar

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from gateway.observe.pages import Cell, Page, SharedPages

#: Stands between the parts of a cell's name; no label value contains it.
_SEPARATOR = "\x1f"


_I = TypeVar("_I", "Counter", "Gauge", "Histogram")


class Instruments:
    """The instruments of one worker, on a page of its own until :meth:`attach`."""

    def __init__(self) -> None:
        self._cells: dict[str, Cell] = {}
        self._page = Page()
        self._shared: SharedPages | None = None
        self._instruments: list[Counter | Gauge | Histogram] = []

    def attach(self, shared: SharedPages, slot: int) -> None:
        """Count in a page that the other workers can read; in the worker, after the fork."""
        self._shared, self._page = shared, shared.page(slot)
        for name, cell in self._cells.items():
            self._page.place(name, cell)

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """A number that only grows; ``name`` has no ``_total``."""
        return self._add(Counter(self, name, text, labels))

    def gauge(self, name: str, text: str) -> Gauge:
        """A number that rises and falls, added up over the living workers."""
        return self._add(Gauge(self, name, text))

    def histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        """Observations in buckets; ``bounds`` are the upper ones, in seconds."""
        return self._add(Histogram(self, name, text, bounds))

    def cell(self, *parts: str) -> Cell:
        """The number of that name."""
        name = _SEPARATOR.join(parts)
        cell = self._cells.get(name)
        if cell is None:
            cell = self._cells[name] = Cell()
            self._page.place(name, cell)
        return cell

    def sums(self) -> dict[str, float]:
        """Every number by its name, added up over all workers, dead and alive."""
        return dict(self._page) if self._shared is None else self._shared.sums()

    @property
    def workers(self) -> int:
        """How many workers' numbers are added up."""
        return 1 if self._shared is None else self._shared.living()

    def collect(self) -> list[Metric]:
        """The metric families of all instruments, as prometheus-client wants them."""
        sums = self.sums()
        return [instrument.family(sums) for instrument in self._instruments]

    def _add(self, instrument: _I) -> _I:
        self._instruments.append(instrument)
        return instrument


def total(sums: Mapping[str, float], *parts: str) -> float:
    """The sum of the numbers whose names begin with these parts: an instrument, label values."""
    name = _SEPARATOR.join(parts)
    return sum(v for key, v in sums.items() if key == name or key.startswith(name + _SEPARATOR))


class Counter:
    """A number, or one for each combination of label values."""

    def __init__(self, owner: Instruments, name: str, text: str, labels: tuple[str, ...]) -> None:
        self._owner = owner
        self.name = name
        self._text = text
        self._labels = labels
        self._cell = None if labels else owner.cell(name)

    def labels(self, *values: str) -> Cell:
        """The number of these label values. They must come from a bounded set."""
        return self._owner.cell(self.name, *values)

    def inc(self, amount: float = 1.0) -> None:
        """Add to the number of a counter without labels."""
        assert self._cell is not None
        self._cell.inc(amount)

    def family(self, sums: Mapping[str, float]) -> Metric:
        """The counter's metric family."""
        family = CounterMetricFamily(self.name, self._text, labels=self._labels)
        for name, value in sorted(sums.items()):
            first, *values = name.split(_SEPARATOR)
            if first == self.name:
                family.add_metric(values, value)
        return family


class Gauge:
    """A number that rises and falls."""

    def __init__(self, owner: Instruments, name: str, text: str) -> None:
        self.name = name
        self._text = text
        self._cell = owner.cell(name)
        self.inc, self.dec = self._cell.inc, self._cell.dec

    def family(self, sums: Mapping[str, float]) -> Metric:
        """The gauge's metric family."""
        return GaugeMetricFamily(self.name, self._text, value=sums.get(self.name, 0.0))


class Histogram:
    """Observations counted in buckets, and their sum."""

    def __init__(self, owner: Instruments, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self.name = name
        self._text = text
        self._bounds = bounds
        self._labels = [*(f"{float(bound)}" for bound in bounds), "+Inf"]
        self._sum = owner.cell(name, "sum")
        self._buckets = [owner.cell(name, label) for label in self._labels]

    def observe(self, value: float) -> None:
        """Count one observation."""
        self._sum.inc(value)
        # in its own bucket only; readers accumulate
        self._buckets[bisect_left(self._bounds, value)].inc()

    def family(self, sums: Mapping[str, float]) -> Metric:
        """The histogram's metric family."""
        found = [sums.get(_SEPARATOR.join((self.name, label)), 0.0) for label in self._labels]
        family = HistogramMetricFamily(self.name, self._text)
        buckets = list(zip(self._labels, accumulate(found), strict=True))
        family.add_metric([], buckets, sums.get(_SEPARATOR.join((self.name, "sum")), 0.0))
        return family
