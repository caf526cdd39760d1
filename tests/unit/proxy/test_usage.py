"""Tap passes on every byte of a stream except the usage chunk that the client did not ask for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.proxy.usage import MAX_EVENT_BYTES, Tap, usages
from gateway.sse import error_event
from tests.arrivals import CUTS, arrivals
from tests.cpu_time import cpu_limit


def chunk(**members: Any) -> bytes:
    return b"data: " + json.dumps(members, ensure_ascii=False).encode()


def content(text: str, **more: Any) -> bytes:
    return chunk(choices=[{"index": 0, "delta": {"content": text}}], **more)


USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
USAGE_CHUNK = chunk(id="x", choices=[], usage=USAGE)
TRICKY = [
    content('say "usage":{"prompt_tokens":99} and "choices":[] now'),
    content("null usage", usage=None),
    content("with usage", usage={"prompt_tokens": 1}),
    chunk(choices=[], prompt_filter_results=[]),
    b": comment",
    b"data: [DONE]",
    b"event: error\ndata: {}",
    b"data: not json",
    b"data: a\ndata: b",
]
EVENTS = st.lists(
    st.sampled_from([USAGE_CHUNK, *TRICKY])
    | st.text(st.characters(codec="utf-8"), max_size=30).map(content),
    max_size=8,
)
ENDS = st.sampled_from([b"\n", b"\r\n"])


def wire(events: list[bytes], end: bytes) -> bytes:
    return b"".join(event.replace(b"\n", end) + end * 2 for event in events)


def ends_an_event(data: bytes) -> bool:
    return not data or data.endswith((b"\n\n", b"\r\n\r\n"))


@given(EVENTS, ENDS, CUTS)
def test_the_stream_is_the_same_except_for_the_usage_chunk(
    events: list[bytes], end: bytes, cuts: list[int]
) -> None:
    tap = Tap(remove_usage=True)
    out = b""
    for piece in arrivals(wire(events, end), cuts):
        out += tap.feed(piece)
        assert tap.between_events is ends_an_event(out)
    out += tap.flush()
    assert out == wire([event for event in events if event != USAGE_CHUNK], end)
    if USAGE_CHUNK in events:
        assert tap.tokens["completionTokens"] == 7


@given(EVENTS, ENDS)
def test_arrivals_of_single_bytes_give_the_same_stream(events: list[bytes], end: bytes) -> None:
    data = wire(events, end)
    tap = Tap(remove_usage=True)
    out = b"".join(tap.feed(data[at : at + 1]) for at in range(len(data)))
    assert out + tap.flush() == wire([event for event in events if event != USAGE_CHUNK], end)


@given(EVENTS, ENDS, CUTS)
def test_a_stream_that_is_only_read_passes_unchanged(
    events: list[bytes], end: bytes, cuts: list[int]
) -> None:
    tap = Tap(remove_usage=False)
    seen = b""
    for piece in arrivals(wire(events, end), cuts):
        assert tap.feed(piece) == piece
        seen += piece
        assert tap.between_events is ends_an_event(seen)
    assert tap.flush() == b""
    if USAGE_CHUNK in events:
        assert tap.tokens["completionTokens"] == 7


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_content_event_is_passed_on_before_it_is_complete(end: bytes) -> None:
    tap = Tap(remove_usage=True)
    assert tap.feed(content("hello")) == content("hello")
    assert not tap.between_events
    assert tap.feed(end * 2) == end * 2
    assert tap.between_events


def test_an_incomplete_usage_chunk_at_the_end_is_removed_and_counted() -> None:
    tap = Tap(remove_usage=True)
    assert tap.feed(content("a") + b"\n\n" + USAGE_CHUNK) == content("a") + b"\n\n"
    assert tap.flush() == b""
    assert tap.tokens == {"promptTokens": 5, "completionTokens": 7}


def test_any_other_incomplete_event_at_the_end_is_passed_on() -> None:
    tap = Tap(remove_usage=True)
    assert tap.feed(b"data: [DONE]") == b""
    assert tap.flush() == b"data: [DONE]"


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("size", [1000, 65536])
def test_a_huge_event_passes_unchanged_and_is_not_buffered(remove: bool, size: int) -> None:
    event = b"data: " + b"x" * (2 * MAX_EVENT_BYTES) + b"\n\n"
    data = event + USAGE_CHUNK + b"\n\ndata: [DONE]\n\n"
    tap = Tap(remove_usage=remove)
    step = size * 16
    out = b"".join(tap.feed(data[at : at + step]) for at in range(0, len(data), step)) + tap.flush()
    assert out == (data.replace(USAGE_CHUNK + b"\n\n", b"") if remove else data)
    assert tap.tokens["promptTokens"] == 5


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("beginning", [content("a")[:-2], b'data: {"a":"', USAGE_CHUNK[:-3]])
def test_the_work_for_an_event_does_not_depend_on_its_arrivals(
    remove: bool, beginning: bytes
) -> None:
    tap = Tap(remove_usage=remove)
    event = beginning + b"x" * (MAX_EVENT_BYTES - 1000) + b"\n\n"
    out = []
    with cpu_limit(20):
        for at in range(0, len(event), 10):
            out.append(tap.feed(event[at : at + 10]))
    assert b"".join(out) == (b"" if remove and b"usage" in beginning else event)


@pytest.mark.parametrize(
    "payload",
    [
        b'"usage":{},' * 100_000,
        b'{"usage":' * 100_000,
        b'{"usage":' * 500 + b"[" + b"1," * 500_000,
        b'"usage": ' + b" " * 1_000_000,
        b'"choices":[' * 100_000,
    ],
    ids=lambda payload: repr(payload[:15]),
)
def test_the_work_for_usage_grows_with_the_payload(payload: bytes) -> None:
    with cpu_limit(20):
        usages(payload)
        Tap(remove_usage=True).feed(b"data: " + payload + b"\n\n")


def test_a_nested_usage_counts_as_part_of_the_outer_one() -> None:
    payload = b'{"usage":{"prompt_tokens":1,"usage":{"prompt_tokens":2}},"usage":{"a":0}}'
    assert usages(payload) == [{"promptTokens": 1}, {}]


def test_the_counts_of_all_dialects_are_found() -> None:
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 3}}}
    delta = {"type": "message_delta", "usage": {"output_tokens": 4}}
    done = {"response": {"usage": {"input_tokens": 8, "output_tokens": 9, "x": {"y": 1}}}}
    for events, prompt, completion in (([start, delta], 3, 4), ([done], 8, 9)):
        tap = Tap(remove_usage=False)
        tap.feed(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))
        assert tap.tokens == {"promptTokens": prompt, "completionTokens": completion}


@pytest.mark.parametrize(
    "payload",
    [
        b'{"usage":{"prompt_tokens":true,"completion_tokens":-1}}',
        b'{"usage":{"prompt_tokens":"5","completion_tokens":null}}',
        b'{"usage":{"prompt_tokens":1.5}}',
        b'{"usage":{',
        b'{"usage":[]}',
        b'{"usage":null}',
        b'{"usage":{"prompt_tokens":' + b"9" * 5000 + b"}}",
        b'{"usage":{"a":' + b"[" * 100_000,
        b'{"usage":{"\xff',
    ],
    ids=lambda payload: repr(payload[:30]),
)
def test_an_invalid_usage_counts_nothing_and_passes_unchanged(payload: bytes) -> None:
    assert all(found == {} for found in usages(payload))
    assert Tap(remove_usage=False).feed(b"data: " + payload + b"\n\n").endswith(payload + b"\n\n")


def test_an_error_event_is_one_line_of_data() -> None:
    payload = {"error": {"message": "a\nb ü \ud800"}}
    event = error_event(payload)
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    assert json.loads(event.removeprefix(b"data: ")) == payload
    assert error_event(payload, named=True).startswith(b"event: error\ndata: ")
