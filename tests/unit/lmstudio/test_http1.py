"""Any split of a response's bytes gives the same payload; malformed responses are rejected."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.lmstudio.http1 import (
    Body,
    Chunked,
    Head,
    Malformed,
    NoBody,
    Sized,
    UntilClose,
    body_of,
    header_line,
    parse_head,
)
from tests.arrivals import CUTS, arrivals


@st.composite
def chunked_wire(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A payload and one of its chunked encodings."""
    chunks = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=6))
    end = draw(st.sampled_from([b"\r\n", b"\n"]))
    wire = b""
    for chunk in chunks:
        size = draw(st.sampled_from([b"%x", b"%X", b"0%x", b"%x ", b"%x;a=b", b'%x ; q="1;2"']))
        wire += size % len(chunk) + end + chunk + end
    trailers = draw(st.lists(st.sampled_from([b"X-A: b", b"Expires: 0"]), max_size=2))
    wire += b"0" + end + b"".join(trailer + end for trailer in trailers) + end
    return b"".join(chunks), wire


def fed(body: Body, pieces: list[bytes]) -> bytes:
    return b"".join(body.feed(piece) for piece in pieces)


def body_for(*headers: tuple[str, str], status: int = 200, method: str = "GET") -> Body:
    return body_of(Head(status, "OK", list(headers), http10=False), method)


@given(chunked_wire(), CUTS)
def test_any_chunks_in_any_arrivals_give_the_payload(
    encoded: tuple[bytes, bytes], cuts: list[int]
) -> None:
    payload, wire = encoded
    body = Chunked()
    assert fed(body, arrivals(wire, cuts)) == payload
    assert body.done
    assert not body.excess
    body.end()


@given(chunked_wire())
def test_arrivals_of_single_bytes_give_the_payload(encoded: tuple[bytes, bytes]) -> None:
    payload, wire = encoded
    body = Chunked()
    assert fed(body, [wire[at : at + 1] for at in range(len(wire))]) == payload
    assert body.done


@given(chunked_wire(), st.data())
def test_a_chunked_body_that_breaks_off_is_never_taken_for_complete(
    encoded: tuple[bytes, bytes], data: st.DataObject
) -> None:
    payload, wire = encoded
    cut = data.draw(st.integers(0, len(wire) - 1))
    body = Chunked()
    assert payload.startswith(body.feed(wire[:cut]))
    assert not body.done
    with pytest.raises(Malformed):
        body.end()


@given(chunked_wire(), st.binary(min_size=1), CUTS)
def test_bytes_after_the_end_are_dropped_and_reported(
    encoded: tuple[bytes, bytes], extra: bytes, cuts: list[int]
) -> None:
    payload, wire = encoded
    body = Chunked()
    assert fed(body, arrivals(wire + extra, cuts)) == payload
    assert body.done
    assert body.excess


@pytest.mark.parametrize(
    "size",
    [b"-5", b"0x5", b"+5", b"", b" 5", b"5 5", b"5_0", b"g", b"5.0", b"\xd9\xa5", b"f" * 16, b",5"],
)
def test_a_malformed_chunk_size_is_rejected(size: bytes) -> None:
    with pytest.raises(Malformed):
        Chunked().feed(size + b"\r\nhello\r\n0\r\n\r\n")
    body = Chunked()
    body.feed(b"1\r\na\r\n")
    with pytest.raises(Malformed):
        fed(body, [bytes([byte]) for byte in size + b"\r\nhello\r\n"])


@pytest.mark.parametrize("extra", [b"X\r\n", b"lo\r\n", b" \r\n", b"\r\r\n"])
def test_a_chunk_longer_than_its_size_is_rejected(extra: bytes) -> None:
    with pytest.raises(Malformed):
        Chunked().feed(b"3\r\nhel" + extra + b"0\r\n\r\n")


def test_an_endless_chunk_line_is_rejected_before_it_fills_the_memory() -> None:
    body = Chunked()
    with pytest.raises(Malformed):
        fed(body, [b"5;", *[b"x" * 1000] * 100])


def test_part_of_a_chunk_is_passed_on_at_once() -> None:
    body = Chunked()
    assert body.feed(b"a\r\nhello") == b"hello"
    assert body.feed(b"wor") == b"wor"


@given(st.binary(), st.binary(max_size=5), CUTS)
def test_a_sized_body_ends_after_its_length(payload: bytes, extra: bytes, cuts: list[int]) -> None:
    body = Sized(len(payload))
    assert fed(body, arrivals(payload + extra, cuts)) == payload
    assert body.done
    assert body.excess is bool(extra)
    body.end()


def test_a_sized_body_that_breaks_off_is_rejected() -> None:
    body = Sized(5)
    assert body.feed(b"four") == b"four"
    with pytest.raises(Malformed):
        body.end()


@given(st.binary(), CUTS)
def test_a_body_without_length_ends_with_the_connection(payload: bytes, cuts: list[int]) -> None:
    body = UntilClose()
    assert fed(body, arrivals(payload, cuts)) == payload
    assert not body.done
    body.end()
    assert body.done


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        ([], UntilClose),
        ([("Content-Length", "5")], Sized),
        ([("content-length", "5"), ("CONTENT-LENGTH", "5")], Sized),
        ([("Transfer-Encoding", "Chunked")], Chunked),
        ([("Transfer-Encoding", "chunked"), ("Content-Length", "5")], Chunked),
    ],
)
def test_the_headers_decide_the_framing(headers: list[tuple[str, str]], kind: type[Body]) -> None:
    assert type(body_for(*headers)) is kind
    assert type(body_for(*headers, method="HEAD")) is NoBody
    assert type(body_for(*headers, status=204)) is NoBody
    assert type(body_for(*headers, status=304)) is NoBody


@pytest.mark.parametrize(
    "headers",
    [
        [("Content-Length", "5"), ("Content-Length", "6")],
        [("Content-Length", "5, 6")],
        [("Content-Length", "-5")],
        [("Content-Length", "+5")],
        [("Content-Length", "0x5")],
        [("Content-Length", "5_0")],
        [("Content-Length", "")],
        [("Content-Length", "\u0665")],
        [("Content-Length", "9" * 30)],
        [("Transfer-Encoding", "gzip")],
        [("Transfer-Encoding", "gzip, chunked")],
        [("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "chunked")],
        [("Transfer-Encoding", "xchunked")],
        [("Transfer-Encoding", "")],
    ],
)
def test_an_ambiguous_framing_is_rejected(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(Malformed):
        body_for(*headers)


@pytest.mark.parametrize("length", ["x", "-1", "5, 6", ""])
@pytest.mark.parametrize(("status", "method"), [(200, "HEAD"), (304, "GET"), (204, "GET")])
def test_a_bad_length_is_rejected_where_there_is_no_body_too(
    length: str, status: int, method: str
) -> None:
    with pytest.raises(Malformed):
        body_for(("Content-Length", length), status=status, method=method)


@pytest.mark.parametrize(
    ("headers", "status", "kept"),
    [
        ([("content-length", "5"), ("CONTENT-LENGTH", "5")], 200, [("content-length", "5")]),
        ([("Content-Length", "5, 5")], 200, [("Content-Length", "5")]),
        ([("Content-Length", "5,5"), ("Content-Length", "5")], 304, [("Content-Length", "5")]),
        ([("Content-Length", "0")], 204, []),
        ([("Content-Length", "5"), ("Transfer-Encoding", "chunked")], 200, []),
        ([("Content-Length", "5"), ("Transfer-Encoding", "chunked")], 304, []),
    ],
)
def test_the_client_gets_at_most_one_length(
    headers: list[tuple[str, str]], status: int, kept: list[tuple[str, str]]
) -> None:
    head = Head(status, "OK", [("X-A", "1"), *headers], http10=False)
    body_of(head, "GET")
    assert [pair for pair in head.headers if pair[0].lower() == "content-length"] == kept
    assert ("X-A", "1") in head.headers


@pytest.mark.parametrize(
    ("version", "lines", "kept"),
    [
        (b"1", b"Transfer-Encoding: chunked", True),
        (b"1", b"Transfer-Encoding: chunked\r\nContent-Length: 5", False),
        (b"0", b"Connection: keep-alive\r\nTransfer-Encoding: chunked", False),
    ],
)
def test_a_connection_with_an_ambiguous_framing_is_not_kept(
    version: bytes, lines: bytes, kept: bool
) -> None:
    head = parse_head(b"HTTP/1." + version + b" 200 OK\r\n" + lines)
    body_of(head, "GET")
    assert head.keep_alive is kept


def test_a_line_that_is_too_long_is_rejected() -> None:
    with pytest.raises(Malformed):
        parse_head(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 65536)


def test_endless_trailers_are_rejected() -> None:
    body = Chunked()
    trailers = (b"X: " + b"a" * 1000 + b"\r\n") * 100
    with pytest.raises(Malformed, match="trailers"):
        body.feed(b"0\r\n" + trailers)


@pytest.mark.parametrize(
    ("value", "coding"), [("GZIP ", "gzip"), ("identity", None), ("", None), (None, None)]
)
def test_the_coding_of_a_body(value: str | None, coding: str | None) -> None:
    headers = [] if value is None else [("content-Encoding", value)]
    assert Head(200, "OK", headers, http10=False).content_coding == coding


def test_a_204_has_no_body() -> None:
    body = body_for(status=204)
    assert body.done
    assert body.feed(b"x") == b""
    assert body.excess


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
def test_header_names_keep_their_case(end: bytes) -> None:
    lines = [b"HTTP/1.1 404 Not Here", b"X-oDD:  a b \t", b"X-Odd: c", b"Empty:", b"L: \xe9"]
    head = parse_head(end.join(lines))
    assert (head.status, head.reason) == (404, "Not Here")
    assert head.headers == [("X-oDD", "a b"), ("X-Odd", "c"), ("Empty", ""), ("L", "\xe9")]
    assert head.get("x-odd") == "a b, c"
    assert head.get("none") is None


@pytest.mark.parametrize(
    "line",
    [
        b"HTTP/2 200 OK",
        b"HTTP/1.1 20 OK",
        b"HTTP/1.1 600 OK",
        b"HTTP/1.1 2000",
        b"HTTP/1.1  200 OK",
        b"http/1.1 200 OK",
        b"garbage",
        b"",
    ],
)
def test_a_bad_status_line_is_rejected(line: bytes) -> None:
    with pytest.raises(Malformed):
        parse_head(line)


@pytest.mark.parametrize("line", [b"A : b", b" folded", b"A", b": b", b"A: b\rc", b"A: \x00"])
def test_a_bad_header_line_is_rejected(line: bytes) -> None:
    with pytest.raises(Malformed):
        parse_head(b"HTTP/1.1 200 OK\r\nX: y\r\n" + line)


@pytest.mark.parametrize(
    ("version", "connection", "kept"),
    [
        (b"1", b"", True),
        (b"1", b"close", False),
        (b"1", b"Close", False),
        (b"1", b"x, close", False),
        (b"0", b"", False),
        (b"0", b"keep-alive", True),
    ],
)
def test_the_version_and_the_connection_header_decide_whether_to_keep_it(
    version: bytes, connection: bytes, kept: bool
) -> None:
    head = parse_head(b"HTTP/1." + version + b" 200\r\nConnection: " + connection)
    assert head.keep_alive is kept
    assert head.reason == ""


@pytest.mark.parametrize(
    ("line", "header"),
    [
        (b"Name: value", ("Name", "value")),
        (b"Name:value", ("Name", "value")),
        (b"Name: \t a \t b\t ", ("Name", "a \t b")),
        (b"Name:", ("Name", "")),
        (b"Name: a:b", ("Name", "a:b")),
        (b"Name: \xe9", ("Name", "\xe9")),
        (b"Name", None),
        (b"", None),
        (b": value", None),
        (b"Name : value", None),
        (b" Name: value", None),
        (b"N\xe4me: value", None),
        (b"Name: a\x00b", None),
        (b"Name: a\rb", None),
        (b"Name: a\n", None),
        (b"Name: \x0b", None),
        (b"Name: \x7f", None),
    ],
)
def test_header_lines(line: bytes, header: tuple[str, str] | None) -> None:
    assert header_line(line) == header


@pytest.mark.parametrize("end", [b"", b"x", b"\x00", b"x" + b"\t" * 65536 + b"\x00"])
def test_the_time_for_a_header_line_is_linear_in_its_length(end: bytes) -> None:
    """The bound is generous: 64 KB of blanks once took 11 s, and with a control byte days."""
    began = time.process_time()
    header_line(b"Name:" + b" " * 65536 + end)
    assert time.process_time() - began < 1
