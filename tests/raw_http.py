"""HTTP/1.1 over plain sockets, for tests that care about the bytes, or about speed."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from typing import Any

#: A number in the text of a stream, which the simulator sends when it is asked to count.
_NUMBER = re.compile(rb'"(?:content|text)":"(\d+) "')


def request(
    method: str, path: str, content: Any = None, simulate: dict[str, Any] | None = None
) -> bytes:
    """The bytes of a request, whose connection closes after the response."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    if content is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"X-Simulator-{name}: {value}" for name, value in (simulate or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + (body if content is not None else b"")


def exchange(port: int, data: bytes, on_arrival: Callable[[], None] = lambda: None) -> bytes:
    """Send a request and return the raw response."""
    with socket.create_connection(("127.0.0.1", port), 60) as client:
        client.sendall(data)
        pieces = []
        while piece := client.recv(65536):
            pieces.append(piece)
            on_arrival()
    return b"".join(pieces)


def counted(response: bytes) -> list[int]:
    """The numbers in a raw stream's text, in the order of arrival."""
    return [int(number) for number in _NUMBER.findall(unchunked(response))]


def unchunked(response: bytes) -> bytes:
    """The payload of a raw response, complete or not; raises ValueError if it is not chunked."""
    head, _, rest = response.partition(b"\r\n\r\n")
    if b"chunked" not in head:
        raise ValueError(f"not chunked: {response!r}")
    pieces = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        pieces.append(rest[:length])
        rest = rest[length + 2 :]
    return b"".join(pieces)
