"""A change of LM Studio's state is reported once."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest

from gateway.observe import HostReporter
from gateway.state import StoreError


class Store:
    """What the workers share."""

    def __init__(self) -> None:
        self.state = "up"
        self.error: StoreError | None = None

    def host_state(self, host: str) -> str:
        if self.error:
            raise self.error
        return self.state

    def set_host_state(self, host: str, state: str) -> bool:
        changed = self.host_state(host) != state
        self.state = state
        return changed


class Events:
    def __init__(self) -> None:
        self.published: list[tuple[str, Any]] = []

    def publish(self, event: str, data: Any) -> None:
        self.published.append((event, data))


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def events() -> Events:
    return Events()


def reporter(store: Store, events: Events) -> HostReporter:
    return HostReporter(cast(Any, store), cast(Any, events))


def test_of_two_workers_one_reports_a_change(
    store: Store, events: Events, caplog: pytest.LogCaptureFixture
) -> None:
    workers = [reporter(store, events) for _ in range(2)]
    for state, reason in (("up", ""), ("down", "refused"), ("down", "refused"), ("up", "")):
        for worker in workers:
            worker.report(state, reason)
        assert worker.is_down() == (state == "down")
    assert events.published == [
        ("host_state", {"host": "default", "state": "down", "reason": "refused"}),
        ("host_state", {"host": "default", "state": "up"}),
    ]
    assert [(one.levelno, one.message) for one in caplog.records] == [
        (logging.WARNING, "LM Studio is down: refused"),
        (logging.WARNING, "LM Studio is up again"),
    ]


def test_while_the_store_is_away_a_worker_reports_what_is_new_to_it(
    store: Store, events: Events
) -> None:
    worker = reporter(store, events)
    store.error = StoreError("away")
    assert not worker.is_down()
    for state in ("up", "down", "down", "up"):
        worker.report(state, "")
    assert [data["state"] for _, data in events.published] == ["down", "up"]
