"""A record reports how its exchange ended, with its times and tokens."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gateway.observe import Record


@pytest.fixture
def record() -> Record:
    record = Record("req_1", "alice", "POST", "/v1/chat/completions", started=100.0)
    record.model, record.status = "m", 200
    return record


def test_only_the_first_end_counts(record: Record) -> None:
    finished: list[Record] = []
    record.on_finish = finished.append
    record.finish()
    moment = record.ended
    record.finish(cancelled=True)
    assert finished == [record]
    assert (record.ended, record.status, record.cancelled) == (moment, 200, False)


def test_a_cancelled_exchange_has_status_499_and_is_not_an_error(record: Record) -> None:
    record.finish(cancelled=True)
    assert (record.status, record.cancelled, record.counts_as_error) == (499, True, False)


@pytest.mark.parametrize(("status", "errors"), [(200, False), (399, False), (400, True)])
def test_exchanges_with_an_error_status_are_errors(
    record: Record, status: int, errors: bool
) -> None:
    record.status = status
    record.finish()
    assert record.counts_as_error is errors


def test_a_broken_stream_is_an_error_whatever_its_status(record: Record) -> None:
    record.fail("first")
    record.fail("second")
    record.finish()
    assert record.counts_as_error
    assert record.error == "first"


def test_the_first_byte_is_that_of_the_body(record: Record) -> None:
    record.started = time.monotonic()
    record.sent(b"")
    assert record.first_byte is None
    assert record.ttft_ms is None
    record.sent(b"abc")
    first = record.first_byte
    record.sent(b"de")
    assert record.first_byte == first
    assert record.sent_bytes == 5


@pytest.mark.parametrize(
    ("tokens", "usage"),
    [
        ({}, (None, None, None)),
        ({"promptTokens": 3}, (3, None, 3)),
        ({"promptTokens": 3, "completionTokens": 0}, (3, 0, 3)),
        ({"promptTokens": 3, "completionTokens": 4}, (3, 4, 7)),
    ],
)
def test_token_usage_always_has_three_members(
    record: Record, tokens: dict[str, int], usage: tuple[Any, ...]
) -> None:
    record.tokens = tokens
    names = ("promptTokens", "completionTokens", "totalTokens")
    assert record.complete_event()["tokenUsage"] == dict(zip(names, usage, strict=True))


def test_tokens_per_second_count_from_the_first_byte_of_a_stream_or_from_the_start(
    record: Record,
) -> None:
    record.tokens, record.first_byte, record.ended = {"completionTokens": 30}, 101.0, 104.0
    assert record.tokens_per_second == 7.5
    record.stream = True
    assert record.tokens_per_second == 10.0
    record.first_byte = record.ended
    assert record.tokens_per_second is not None  # no division by zero
    record.tokens = {}
    assert record.tokens_per_second is None


def test_times_are_milliseconds_with_one_decimal(record: Record) -> None:
    record.first_byte, record.ended = 100.1234, 101.98765
    complete = record.complete_event()
    assert (complete["ttftMs"], complete["totalTimeMs"]) == (123.4, 1987.7)
