"""What the scripts share: cheap HTTP over gevent sockets, and a look at the gateway's processes.

To be imported after ``gevent.monkey.patch_all()``.
"""

from __future__ import annotations

import json
import re
import resource
import socket
from collections.abc import Callable
from typing import Any

import psutil

from tests.processes import Gateway

MODEL = "qwen2-1.5b-instruct"
EMBEDDING = "text-embedding-nomic-embed-text-v1.5"
CHAT = "/v1/chat/completions"
_TOKEN = re.compile(rb'"content":"(\d+) "')


def chat(count: int, stream: bool, **more: Any) -> dict[str, Any]:
    """A chat whose answer counts to ``count``."""
    messages = [{"role": "user", "content": f"count to {count}"}]
    return {"model": MODEL, "messages": messages, "stream": stream, **more}


def request(
    method: str, path: str, content: Any = None, simulate: dict[str, Any] | None = None
) -> bytes:
    """A request as it goes on the wire; the connection ends with its answer."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: gateway", "Connection: close"]
    if content is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"X-Simulator-{name}: {value}" for name, value in (simulate or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + (body if content is not None else b"")


def exchange(port: int, data: bytes, on_arrival: Callable[[], None] = lambda: None) -> bytes:
    """Send a request and return the raw answer."""
    with socket.create_connection(("127.0.0.1", port), 60) as client:
        client.sendall(data)
        pieces = []
        while piece := client.recv(65536):
            pieces.append(piece)
            on_arrival()
    return b"".join(pieces)


def counted(answer: bytes) -> list[int]:
    """The numbered tokens of a raw stream, in order of arrival."""
    return [int(number) for number in _TOKEN.findall(unchunked(answer))]


def unchunked(answer: bytes) -> bytes:
    """The payload of a chunked answer, as far as it came."""
    rest, pieces = answer.partition(b"\r\n\r\n")[2], []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        pieces.append(rest[:length])
        rest = rest[length + 2 :]
    return b"".join(pieces)


def allow_many_files() -> None:
    """Raise the limit of open files as far as it goes; the children inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def memory(gateway: Gateway) -> tuple[float, float]:
    """RSS and PSS of all the gateway's processes together, in MiB."""
    main = psutil.Process(gateway.process.pid)
    found = [one.memory_full_info() for one in [main, *main.children(recursive=True)]]
    return sum(one.rss for one in found) / 2**20, sum(one.pss for one in found) / 2**20


def descriptors(gateway: Gateway) -> tuple[list[int], list[int]]:
    """Open files and TCP sockets (listening ones aside) of each worker."""
    workers = [psutil.Process(pid) for pid in gateway.workers()]
    sockets = [
        [one for one in worker.net_connections("tcp") if one.status != psutil.CONN_LISTEN]
        for worker in workers
    ]
    return [worker.num_fds() for worker in workers], [len(one) for one in sockets]
