"""An exchange's end reaches the metrics, the events and the log, each once and in order."""

from __future__ import annotations

import json
from typing import Any

import gevent
import pytest

from gateway.observe import AccessLog, Record, Reporter
from gateway.observe.access_log import MAX_LINES


class Events:
    """Takes what is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any], str]] = []

    def publish(self, event: str, data: dict[str, Any], operation: str = "") -> None:
        self.told.append((event, data, operation))


class Metrics:
    """Counts what is counted."""

    def __init__(self) -> None:
        self.begun, self.ended = 0, 0

    def begin(self) -> None:
        self.begun += 1

    def end(self, record: Record) -> None:
        self.ended += 1


def record() -> Record:
    return Record("req_1", "alice", "POST", "/v1/chat/completions", asked_model="a", model="b")


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def accounts(events: Events) -> Reporter:
    return Reporter(events, Metrics(), AccessLog("error", "text"))  # type: ignore[arg-type]


def test_an_exchange_is_told_when_it_begins_and_when_it_ends(
    accounts: Reporter, events: Events
) -> None:
    one = record()
    accounts.begin(one)
    one.status = 200
    one.finish()
    told = [(kind, data["requestId"], operation) for kind, data, operation in events.told]
    assert [entry[0] for entry in told] == ["inference_start", "inference_complete"]
    assert {entry[1] for entry in told} == {"req_1"}
    assert told[0][2] == told[1][2] != ""


def test_a_failure_is_told_before_the_end(accounts: Reporter, events: Events) -> None:
    one = record()
    accounts.begin(one)
    one.fail("why")
    one.finish()
    kinds = [kind for kind, _, _ in events.told]
    assert kinds == ["inference_start", "error", "inference_complete"]
    error = events.told[1][1]
    assert error.keys() == {"requestId", "operation", "error", "totalTimeMs"}
    assert (error["operation"], error["error"]) == ("inference", "why")


def test_a_client_that_left_is_no_failure(accounts: Reporter, events: Events) -> None:
    one = record()
    accounts.begin(one)
    one.fail("the client closed the connection")
    one.finish(cancelled=True)
    assert [kind for kind, _, _ in events.told] == ["inference_start", "inference_complete"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_last_lines_are_written_at_the_end(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = AccessLog("info", form)
    log.start()
    one = record()
    one.finish()
    log.exchange(one)
    log.request({"requestId": "r", "client": "", "method": "GET", "path": "/health", "status": 200})
    log.stop()
    first, second = capsys.readouterr().err.splitlines()
    assert "req_1" in first
    assert "/health" in second
    if form == "json":
        assert json.loads(first)["modelAsked"] == "a"


def test_lines_are_written_while_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    log = AccessLog("info", "text")
    log.start()
    one = record()
    one.finish()
    log.exchange(one)
    text = ""
    with gevent.Timeout(20):
        while "req_1" not in text:
            gevent.sleep(0.02)
            text += capsys.readouterr().err
    log.stop()
    assert text.count("\n") == 1


def test_lines_that_nobody_takes_need_no_memory() -> None:
    log = AccessLog("info", "text")
    one = record()
    one.finish()
    for _ in range(MAX_LINES + 10):
        log.exchange(one)
    assert len(log._waiting) == MAX_LINES


@pytest.mark.parametrize("level", ["warn", "error"])
def test_above_info_nothing_is_kept(level: str) -> None:
    log = AccessLog(level, "text")
    log.exchange(record())
    assert not log._waiting
