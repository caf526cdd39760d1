"""A flood of warnings of one kind is one line, and the next line counts the rest."""

from __future__ import annotations

import logging

import pytest

from gateway.logs import Throttle, throttle


class Clock:
    """Stands for the module ``time``; the test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_767_268_800.0 + self.now - 1000.0  # 2026-01-01T12:00:00Z


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stand_in = Clock()
    monkeypatch.setattr(throttle, "time", stand_in)
    return stand_in


def test_a_flood_is_logged_once_and_counted(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    limited = Throttle(logging.getLogger("gateway.test"), interval=60)
    for number in range(313):
        limited.warning("head", "rejected %d", number)
    clock.now += 59
    limited.warning("head", "rejected %d", 313)
    assert caplog.messages == ["rejected 0"]
    clock.now += 1
    limited.warning("head", "rejected %d", 314)
    assert caplog.messages[1:] == ["rejected 314 (313 more since 12:00:00)"]
    clock.now += 60
    limited.warning("head", "rejected %d", 315)
    assert caplog.messages[2:] == ["rejected 315"]


def test_one_kind_does_not_hide_another(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    limited = Throttle(logging.getLogger("gateway.test"), interval=60)
    limited.warning("head", "a head")
    limited.warning("body", "a body: 100%")
    limited.warning("body", "a body")
    assert caplog.messages == ["a head", "a body: 100%"]
