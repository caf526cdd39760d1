"""Sends a request's bytes to LM Studio, for as long as LM Studio takes them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import gevent

from gateway.errors import UpstreamTimeout
from gateway.lmstudio import sockets
from gateway.logs import Throttle

_throttle = Throttle(logging.getLogger(__name__))

#: Seconds that LM Studio may take no byte of a request.
SEND_TIMEOUT = 60.0
#: Bytes after which sending or receiving yields to the event loop. gevent's sockets yield only when
#: they have to wait, which a fast peer never makes them do.
YIELD_BYTES = 256 * 1024
#: Bodies up to this size are sent together with the head.
_JOINED_BYTES = 65536


class NothingSent(Exception):
    """The connection failed before a byte was sent, so a retry can't repeat anything."""


def send(sock: Any, pieces: Iterable[bytes]) -> bool:
    """Send a request, given in pieces; returns whether all of it was sent.

    If it was not, LM Studio may have responded early (with a 413, say), so reading the response
    shows what happened. Raises NothingSent when the connection fails before the first byte, and
    UpstreamTimeout after :data:`SEND_TIMEOUT` seconds without progress.
    """
    started = False
    unyielded = 0
    for piece in pieces:
        sock.settimeout(SEND_TIMEOUT)
        rest = memoryview(piece)
        while rest:
            try:
                sent = sock.send(rest[:YIELD_BYTES])
            except TimeoutError:  # ours, or the kernel's ETIMEDOUT
                if sockets.peek(sock):
                    return False
                _throttle.warning("send", "LM Studio took no byte of a request for a minute")
                raise UpstreamTimeout("LM Studio did not take the request in time.") from None
            except OSError:
                if started:
                    return False
                raise NothingSent from None
            started = True
            rest = rest[sent:]
            unyielded += sent
            if unyielded >= YIELD_BYTES:
                unyielded = 0
                gevent.sleep(0)
    return True


def pieces_of(
    method: str, target: str, headers: dict[str, str], body: bytes | Iterator[bytes] | None
) -> Iterator[bytes]:
    """Serialise a request. An iterated body is chunked unless the headers give its length."""
    lines = [f"{method} {target} HTTP/1.1\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
    lines.append("\r\n")
    head = "".join(lines).encode("latin-1")
    if body is None:
        yield head
    elif not isinstance(body, bytes):
        yield head
        yield from body if "Content-Length" in headers else _chunked(body)
    elif len(body) <= _JOINED_BYTES:
        yield head + body
    else:
        yield head
        yield body


def _chunked(body: Iterator[bytes]) -> Iterator[bytes]:
    for piece in body:
        yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"
