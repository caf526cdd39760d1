"""The end of an exchange is reported to the metrics, the events and the log, once and in order."""

from __future__ import annotations

import json
from typing import Any

import gevent
import pytest

from gateway.observe import AccessLog, Record, Reporter
from gateway.observe.access_log import MAX_LINES


class Events:
    """Records what is published."""

    def __init__(self) -> None:
        self.published: list[tuple[str, dict[str, Any], str]] = []

    def publish(self, event: str, data: dict[str, Any], operation: str = "") -> None:
        self.published.append((event, data, operation))

    @property
    def types(self) -> list[str]:
        return [event for event, _, _ in self.published]


class Metrics:
    """Counts the calls."""

    def __init__(self) -> None:
        self.begun, self.ended = 0, 0

    def begin(self) -> None:
        self.begun += 1

    def end(self, record: Record) -> None:
        self.ended += 1


def record() -> Record:
    return Record("req_1", "alice", "POST", "/v1/chat/completions", requested_model="a", model="b")


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def reporter(events: Events) -> Reporter:
    return Reporter(events, Metrics(), AccessLog("error", "text"))  # type: ignore[arg-type]


def test_the_start_and_the_end_of_an_exchange_are_published(
    reporter: Reporter, events: Events
) -> None:
    one = record()
    reporter.begin(one)
    one.status = 200
    one.finish()
    assert events.types == ["inference_start", "inference_complete"]
    assert {data["requestId"] for _, data, _ in events.published} == {"req_1"}
    start, end = (operation for _, _, operation in events.published)
    assert start == end != ""


def test_a_failure_is_published_before_the_end(reporter: Reporter, events: Events) -> None:
    one = record()
    reporter.begin(one)
    one.fail("why")
    one.finish()
    assert events.types == ["inference_start", "error", "inference_complete"]
    error = events.published[1][1]
    assert error.keys() == {"requestId", "operation", "error", "totalTimeMs"}
    assert (error["operation"], error["error"]) == ("inference", "why")


def test_a_cancelled_exchange_publishes_no_error(reporter: Reporter, events: Events) -> None:
    one = record()
    reporter.begin(one)
    one.fail("the client closed the connection")
    one.finish(cancelled=True)
    assert events.types == ["inference_start", "inference_complete"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_stopping_the_log_writes_its_last_lines(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = AccessLog("info", form)
    log.start()
    one = record()
    one.finish()
    log.log_exchange(one)
    log.log_request(
        {"requestId": "r", "client": "", "method": "GET", "path": "/health", "status": 200}
    )
    log.stop()
    first, second = capsys.readouterr().err.splitlines()
    assert "req_1" in first
    assert "/health" in second
    if form == "json":
        assert json.loads(first)["modelAsked"] == "a"


def test_lines_are_written_without_waiting_for_the_stop(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = AccessLog("info", "text")
    log.start()
    one = record()
    one.finish()
    log.log_exchange(one)
    text = ""
    with gevent.Timeout(20):
        while "req_1" not in text:
            gevent.sleep(0.02)
            text += capsys.readouterr().err
    log.stop()
    assert text.count("\n") == 1


def test_the_queue_of_lines_is_bounded() -> None:
    log = AccessLog("info", "text")
    one = record()
    one.finish()
    for _ in range(MAX_LINES + 10):
        log.log_exchange(one)
    assert len(log._queue) == MAX_LINES


@pytest.mark.parametrize("level", ["warn", "error"])
def test_above_info_no_lines_are_queued(level: str) -> None:
    log = AccessLog(level, "text")
    log.log_exchange(record())
    assert not log._queue
