"""Compares the gateway's request parser with h11 and llhttp: ``python -m tests.fuzz.differential``.

Valid requests are changed at random. Whatever the gateway accepts, both other parsers must accept,
with the same method, target, headers, body and end; else two parties could read one connection
differently, which smuggles requests. Prints the request that shows a difference and exits with
status 1.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import h11
import httptools

from gateway.serving.parsing import RequestRejected, parse
from gateway.serving.reading import ConnectionEnded, RequestBody, RequestReader

SEEDS = (
    b"GET /v1/models HTTP/1.1\r\nHost: gateway\r\nAccept: */*\r\n\r\n",
    b"GET http://gateway:80/v1/models?a=b HTTP/1.1\r\nHost: gateway\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: [::1]:8002\r\n\r\n",
    b"\r\n\r\nGET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: gateway\r\nContent-Length: 11\r\n"
    b"Content-Type: application/json\r\nCookie: a=b\r\nCookie: c=d\r\n\r\n{\"a\":\"b\\n\"}",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n1;name=value;q=\"a b\"\r\n!\r\n0\r\nX-Trailer: yes\r\n\r\n",
    b"PUT /v1/files/a%2Fb HTTP/1.1\r\nHost: gateway\r\nX-A: 1\r\nX-B:\t2 \r\nx-a: 3\r\n"
    b"Transfer-Encoding: Chunked\r\n\r\n0003\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n"
    b"GET / HTTP/1.1\r\n",
)  # fmt: skip
#: What mutations put into a request: whatever parsers are known to disagree about.
WORDS = (
    b"\r\n", b"\n", b"\r", b"\x00", b" ", b"\t", b":", b";", b",", b"=", b'"', b"\x0b", b"\x7f",
    b"\xff", b"#", b"?", b"//", b"*", b"%00", b"@", b"0", b"00", b"+1", b"-1", b"0x5", b"1_0", b"5",
    b"Content-Length: 5\r\n", b"Content-Length: 11\r\n", b"Content-Length:\r\n", b"Host: other\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n", b"chunked", b"gzip, ",
    b"Transfer_Encoding: chunked\r\n", b"Transfer-Encoding : chunked\r\n", b" folded\r\n", b"GET ",
    b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"0\r\n\r\n", b"HTTP/1.0", b"HTTP/1.1",
    b"HTTP/2.0", b"X-A: \xe9\r\n", b"X_Under: score\r\n", b";a", b" ;a", b";a=b", b"QUERY",
    b"GET / ",
)  # fmt: skip


@dataclass
class Request:
    """A request as a parser has read it."""

    method: str = ""
    target: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    complete: bool = False

    def environ(self) -> dict[str, str]:
        """The headers in the form of WSGI, as the gateway keeps them."""
        joined: dict[str, str] = {}
        for name, value in self.headers:
            key = name.upper().replace("-", "_")
            if "_" not in name:
                separator = "; " if key == "COOKIE" else ","
                joined[key] = joined[key] + separator + value if key in joined else value
        if "TRANSFER_ENCODING" in joined:
            joined["TRANSFER_ENCODING"] = joined["TRANSFER_ENCODING"].lower()
        return joined


class _Arrived:
    """A socket on which everything has arrived."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def settimeout(self, seconds: float) -> None:
        pass

    def recv(self, size: int) -> bytes:
        data, self._data = self._data[:size], self._data[size:]
        return data


class Rejected(Exception):
    """A parser rejects a request; the message says why."""


def ours(data: bytes) -> tuple[Request, dict[str, str], int] | None:
    """A request, its headers and its size in bytes as the gateway reads them, None if it does not
    accept it."""
    environ: dict[str, Any] = {}
    reader = RequestReader(_Arrived(data))
    try:
        _, length = parse(reader.head(1), environ)
        body = RequestBody(reader, length).read()
    except (RequestRejected, ConnectionEnded):
        return None
    rest = 0
    while reader.pending:
        reader.read(1, time.monotonic() + 1)
        rest += 1
    request = Request(environ["REQUEST_METHOD"], environ["RAW_URI"], body=body, complete=True)
    headers = {
        key.removeprefix("HTTP_"): value
        for key, value in environ.items()
        if key.startswith(("HTTP_", "CONTENT_"))
    }
    if length is None:  # h11 writes the coding in lower case
        headers["TRANSFER_ENCODING"] = headers["TRANSFER_ENCODING"].lower()
    return request, headers, len(data) - rest


def by_h11(data: bytes) -> Request:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    # h11 is stricter: it accepts no empty lines before a request (RFC 9112 §2.2 tolerates them)
    data = re.sub(rb"\A(?:\r\n)+", b"", data)
    found = Request()
    try:
        connection.receive_data(data)
        while not found.complete:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                found.method, found.target = event.method.decode(), event.target.decode()
                # raw_items(): h11 would change the case of names
                found.headers = [
                    (name.decode(), value.decode("latin-1"))
                    for name, value in event.headers.raw_items()
                ]
            elif isinstance(event, h11.Data):
                found.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                found.complete = True
            else:
                break
    except h11.RemoteProtocolError as error:
        raise Rejected(str(error)) from None
    if connection.trailing_data[0]:
        raise Rejected("the request ends earlier")
    return found


class _Callbacks(Request):
    """What llhttp calls."""

    def on_url(self, url: bytes) -> None:
        self.target += url.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.in_trailers:
            # llhttp is laxer: it leaves the blanks behind a value to its caller
            self.headers.append((name.decode("latin-1"), value.decode("latin-1").rstrip(" \t")))

    def on_headers_complete(self) -> None:
        # llhttp is laxer: it reports trailers as headers
        self.in_trailers = True

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True

    in_trailers = False


def by_llhttp(data: bytes) -> Request:
    found = _Callbacks()
    parser = httptools.HttpRequestParser(found)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass  # llhttp leaves what follows to the other protocol, and the gateway ignores Upgrade
    except httptools.HttpParserError as error:
        raise Rejected(str(error)) from None
    found.method = parser.get_method().decode()
    return found


#: Where the oracles are stricter than the gateway, which follows the RFCs there: the oracle, the
#: beginning of its complaint, and the reason.
STRICTER: tuple[tuple[str, str, str], ...] = (
    ("llhttp", "Invalid method encountered", "llhttp knows a list of methods; any token is one"),
    ("llhttp", "Expected space after method", "the same, with a known method as its beginning"),
    ("llhttp", "Invalid character in chunk size", "blanks before an extension: RFC 9112 §7.1.1"),
    ("llhttp", "Invalid character in chunk extensions", "blanks inside: RFC 9112 §7.1.1"),
    (
        "llhttp",
        "Request has invalid `Transfer-Encoding`",
        "llhttp takes no tab behind the coding, which RFC 9110 §5.5 does; it is chunked alone here",
    ),
    ("h11", "illegal chunk header", "blanks before an extension: RFC 9112 §7.1.1"),
)


def is_known(oracle: str, complaint: str) -> bool:
    """Whether an oracle is known to be stricter there."""
    return any(oracle == name and complaint.startswith(text) for name, text, _ in STRICTER)


def differences(data: bytes) -> tuple[bool, list[str]]:
    """Whether the gateway accepts a request, and what the oracles think of it."""
    found = ours(data)
    if found is None:
        return False, []
    request, headers, size = found
    problems = []
    for name, oracle in (("h11", by_h11), ("llhttp", by_llhttp)):
        try:
            other = oracle(data[:size])
        except Rejected as error:
            if not is_known(name, str(error)):
                problems.append(f"{name} rejects it: {error}")
            continue
        problems += [
            f"{name} reads another {what}: {theirs!r} instead of {mine!r}"
            for what, mine, theirs in (
                ("method", request.method, other.method),
                ("target", request.target, other.target),
                ("set of headers", headers, other.environ()),
                ("body", request.body, other.body),
                ("end", True, other.complete),
            )
            if mine != theirs
        ]
    return True, problems


def mutated(source: random.Random) -> bytes:
    """A valid request with a few random changes."""
    data = bytearray(source.choice(SEEDS))
    for _ in range(source.choice((0, 1, 1, 1, 2, 2, 3, 5))):
        at = source.randrange(len(data) + 1)
        end = min(len(data), at + source.choice((0, 0, 1, 1, 2, 5, 20)))
        change = source.randrange(6)
        if change <= 2:
            data[at:end] = source.choice(WORDS)
        elif change == 3:
            data[at:end] = b""
        elif change == 4:
            data[at:at] = data[at:end]
        else:
            data[at : at + 1] = bytes([source.randrange(256)])
        if change == 0:  # words that are lines belong at the beginning of a line
            starts = [found.end() for found in re.finditer(rb"\r\n", bytes(data))] or [0]
            at = source.choice(starts)
            data[at:at] = source.choice(WORDS)
    return bytes(data)


def run(seed: int, seconds: float, count: int | None = None) -> Counter[str]:
    """Compare for so many seconds or requests; returns how many were ``sent`` and ``accepted``.

    Raises AssertionError at a difference.
    """
    source = random.Random(seed)
    counts: Counter[str] = Counter()
    deadline = time.monotonic() + seconds
    while counts["sent"] != count and time.monotonic() < deadline:
        data = mutated(source)
        accepted, problems = differences(data)
        assert not problems, f"{data!r}:\n" + "\n".join(problems)
        counts["sent"] += 1
        counts["accepted"] += accepted
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**9)
    print(f"seed {seed}", flush=True)
    try:
        print(dict(run(seed, options.seconds)))
    except AssertionError as difference:
        print(difference)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
