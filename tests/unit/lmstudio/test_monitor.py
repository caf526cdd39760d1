"""The monitor probes LM Studio while there is a reason to, and reports what it finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import gevent
import pytest

from gateway.errors import Unreachable
from gateway.lmstudio import Monitor, monitor


class Host:
    """An LM Studio that answers as its list of outcomes says; after the list it is up."""

    def __init__(self) -> None:
        self.outcomes: list[bool] = []
        self.probes = 0
        self.reports: list[tuple[str, str]] = []
        self.monitor = Monitor(self._probe, lambda state, why: self.reports.append((state, why)))

    def _probe(self, timeout: float) -> None:
        self.probes += 1
        self.monitor.suspect()  # as the failed connection of a probe does
        if self.outcomes and not self.outcomes.pop(0):
            raise Unreachable("nobody there")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        gevent.sleep(0.001)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(monitor, "INTERVAL", 0.001)
    monkeypatch.setattr(monitor, "CONFIRM_AFTER", 0.001)
    made = Host()
    greenlet = gevent.spawn(made.monitor.run)
    yield made
    greenlet.kill()


def test_nothing_is_probed_without_a_reason(host: Host) -> None:
    gevent.sleep(0.02)
    assert host.probes == 0


def test_it_probes_until_lm_studio_is_back_and_then_rests(host: Host) -> None:
    host.outcomes = [False] * 6
    host.monitor.suspect()
    wait_for(lambda: host.reports[-1:] == [("up", "")])
    assert host.reports == [("down", "nobody there")] * 3 + [("up", "")]
    probes = host.probes
    gevent.sleep(0.02)
    assert host.probes == probes


def test_one_failed_probe_is_not_yet_down(host: Host) -> None:
    host.outcomes = [False]
    host.monitor.suspect()
    wait_for(lambda: bool(host.reports))
    assert host.reports == [("up", "")]
