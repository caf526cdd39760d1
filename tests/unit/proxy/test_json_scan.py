"""The scanner of large bodies and the C scanner of small ones agree about every body."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import BadRequest
from gateway.proxy import json_scan
from gateway.proxy.json_scan import MAX_DEPTH, MAX_MEMBERS, Found
from gateway.proxy.members import LARGE, UNREAD, Members

#: Small enough to cut most tokens; a number has to fit in it.
WINDOWS = st.sampled_from([16, 17, 23, 64, json_scan.WINDOW])
TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"0", b"e", b".", b"-", b" ", b"\xff"]


def no_pause() -> None:
    """Nothing else runs in a unit test."""


def large(body: bytes, window: int = json_scan.WINDOW) -> Found | None:
    """What the scanner of large bodies finds; None if it rejects the body."""
    try:
        return json_scan.scan(body, no_pause, window)
    except ValueError:
        return None


def small(body: bytes) -> Found | None:
    """What the scanner of small bodies finds."""
    assert len(body) <= LARGE
    try:
        found = Members(body)
    except BadRequest:
        return None
    spans = {name: found.span(name) for name in found.values}
    return Found(found._opening, spans, found._empty)


def nested(begin: str, end: str, depth: int, core: str = "") -> bytes:
    return f'{{"x":{begin * depth}{core}{end * depth}}}'.encode()


def fields(count: int) -> bytes:
    return b"{" + b",".join(b'"k%d":%d' % (n, n) for n in range(count)) + b"}"


BLANKS = st.text(" \t\n\r", max_size=2)
#: JSON texts with blanks, escapes, and numbers in every form.
STRINGS = st.text(max_size=12).flatmap(
    lambda text: st.sampled_from([json.dumps(text), json.dumps(text, ensure_ascii=False)])
)
SCALARS = st.one_of(
    STRINGS,
    st.sampled_from(["0", "-0", "1.5", "-1e+9", "12E-3", "true", "false", "null", '"\\ud800"']),
    st.integers(-(10**10), 10**10).map(str),
)


def containers(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    item = st.tuples(BLANKS, inner, BLANKS).map("".join)
    member = st.tuples(BLANKS, STRINGS, BLANKS, st.just(":"), item).map("".join)
    return st.one_of(
        st.lists(item, max_size=4).map(lambda items: f"[{','.join(items)}]"),
        st.lists(member, max_size=4).map(lambda items: "{" + ",".join(items) + "}"),
        BLANKS.map(lambda blanks: f"[{blanks}]"),
        BLANKS.map(lambda blanks: "{" + blanks + "}"),
    )


VALUES = st.recursive(SCALARS, containers, max_leaves=25)
BODIES = st.tuples(BLANKS, containers(VALUES), BLANKS).map("".join)
EDITS = st.lists(
    st.tuples(
        st.integers(0, 200), st.integers(0, 3), st.binary(max_size=2) | st.sampled_from(TOKENS)
    ),
    max_size=3,
)


@settings(max_examples=400)
@given(BODIES, EDITS, WINDOWS)
def test_both_scanners_give_the_same_members(
    text: str, edits: list[tuple[int, int, bytes]], window: int
) -> None:
    body = text.encode("utf-8", "surrogatepass")
    for place, removed, added in edits:
        body = body[:place] + added + body[place + removed :]
    assert large(body, window) == small(body)


def test_both_scanners_agree_on_random_tokens() -> None:
    chance = random.Random(12)
    tokens = [*TOKENS, b'"a"', b'"a":', b'"\\u0061":', b"null", b"12", b'{"a":', b"},", b"],"]
    accepted = 0
    for _ in range(20_000):
        body = b'{"a":' + b"".join(chance.choices(tokens, k=chance.randrange(1, 9))) + b"}"
        found = small(body)
        accepted += found is not None
        assert large(body, 16) == large(body) == found, body
    assert accepted > 100


@pytest.mark.parametrize("window", range(16, 60))
def test_a_window_may_end_anywhere(window: int) -> None:
    body = (
        '{ "a" : [ 1.5e+10 , [ [ [ [ [ ] , { } ] ] ] ] , "\\u00e9\\n ü𝄞" ] , "b\\u0062" : '
        '{"x":{"y":{"z":{"w":{"v":{"long enough to be cut":[{}, {"a":-0.5E-7},true]}}}}}},'
        '"c": "' + "text " * 20 + '"    }   '
    ).encode()
    expected = small(body)
    assert expected is not None
    assert large(body, window) == expected
    assert [json.loads(body[start:end]) for start, end in expected.spans.values()] == list(
        json.loads(body).values()
    )


@pytest.mark.parametrize("scanner", [large, small])
@pytest.mark.parametrize(
    ("body", "valid"),
    [
        (nested("[", "]", MAX_DEPTH), True),
        (nested("[", "]", MAX_DEPTH + 1), False),
        (nested('{"a":', "}", MAX_DEPTH, "1"), True),
        (nested('{"a":', "}", MAX_DEPTH + 1, "1"), False),
        (nested("[{},", "]", MAX_DEPTH - 1, "1"), True),
        (nested("", "", 1, '"' + "[{" * 1000 + '"'), True),
        (nested("", "", 1, f"[{'[],' * 1000}[]]"), True),
        (nested("[", "]", 30_000), False),
        (fields(MAX_MEMBERS), True),
        (fields(MAX_MEMBERS + 1), False),
    ],
    ids=repr,
)
def test_both_scanners_have_the_same_limits(
    scanner: Callable[[bytes], Found | None], body: bytes, valid: bool
) -> None:
    assert (scanner(body) is not None) is valid


BIG = b"x" * LARGE
SIZE = 4 * json_scan.WINDOW


def test_only_the_values_that_injection_reads_are_built() -> None:
    found = Members(
        b'{"model":"m","n":12,"stream":true,"text":"%b","stream_options":{"a":1}}' % BIG
    )
    assert found.values == {
        "model": "m",
        "n": UNREAD,
        "stream": True,
        "text": UNREAD,
        "stream_options": {"a": "1"},
    }
    assert found.raw("stream_options") == '{"a":1}'


def test_of_a_huge_string_only_the_beginning_is_built() -> None:
    for text in ("ü" * LARGE, "\\u00fc" * LARGE, "a" + "\\n" * LARGE):
        found = Members(f'{{"model":"{text}","stream_options":[{"1," * LARGE}1]}}'.encode())
        assert 100 < len(found.values["model"]) <= 1024
        assert json.loads(f'"{text}"').startswith(found.values["model"])
        assert found.values["stream_options"] is UNREAD


def test_members_are_spliced_into_a_large_body() -> None:
    body = b' { "a":"%b" , "b" : 1 , "a\\u0062":2, "b":3.10 } ' % ("ü".encode() * LARGE)
    out = Members(body).with_injected({"b": '"é"', "new": "0", "ab": "[]"})
    assert out == body.replace(b"3.10", '"é"'.encode()).replace(b":2,", b":[],").replace(
        b" { ", b' {"new":0, ', 1
    )


@pytest.mark.parametrize("size", [0, LARGE])
def test_a_byte_order_mark_is_named(size: int) -> None:
    with pytest.raises(BadRequest, match="byte-order mark"):
        Members(b'\xef\xbb\xbf{"a":"' + b"x" * size + b'"}')


def test_a_number_that_is_longer_than_a_window_is_named() -> None:
    for number in (b"1" * LARGE, b"1." + b"0" * LARGE, b"1e-" + b"1" * LARGE):
        with pytest.raises(BadRequest, match="number at byte 5 is too long"):
            Members(b'{"a":' + number + b"}")


@pytest.mark.parametrize(
    "filling",
    [b'"%b"' % (b"x" * SIZE), b" " * SIZE + b"1", b"[" + b"[[[[[]]]]]," * (SIZE // 10) + b"1]"],
    ids=lambda filling: repr(filling[:10]),
)
def test_the_scanner_pauses_in_bodies_of_any_shape(filling: bytes) -> None:
    pauses: list[None] = []
    json_scan.scan(b'{"a":' + filling + b"}", lambda: pauses.append(None))
    # once in each window to check the encoding, and once to scan
    assert len(pauses) >= 2 * (SIZE // json_scan.WINDOW)


def test_a_name_that_is_too_long_to_matter_is_not_reported() -> None:
    found = json_scan.scan(b'{"%b":1,"a":2}' % BIG, no_pause)
    assert found.spans.keys() == {"a"}
    only = b'{"%b":1}' % BIG
    assert Members(only).with_injected({"model": '"m"'}) == b'{"model":"m",' + only[1:]
