"""The measurements, each of one target; names end in the figures' units."""

from __future__ import annotations

import json
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector

from benchmarks.targets import EVENTS_PER_STREAM, KEY, Process, Target
from tests.processes import free_port

_WRK_LINE = re.compile(r"Requests/sec:\s+([0-9.]+)")
_WRK_QUANTILE = re.compile(r"^\s+(50|99)%\s+([0-9.]+)(us|ms|s)$", re.MULTILINE)
_WRK_COUNT = re.compile(r"^\s+(\d+) requests in", re.MULTILINE)
_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0}


@dataclass
class Requests:
    """Results of plain requests over persistent connections."""

    per_second: float
    cpu_ms: float
    median_ms: float
    p99_ms: float


def requests(
    target: Target, folder: Path, connections: int, seconds: int, prompt: int = 100
) -> Requests:
    """Send chats without a model with wrk on one thread, each with ``prompt`` bytes."""
    body = json.dumps({"messages": [{"role": "user", "content": "x" * prompt}]})
    script = folder / f"post-{prompt}.lua"
    script.write_text(
        'wrk.method = "POST"\n'
        f"wrk.body = [[{body}]]\n"
        'wrk.headers["Content-Type"] = "application/json"\n'
        f'wrk.headers["Authorization"] = "Bearer {KEY}"\n'
    )
    wrk = shutil.which("wrk")
    if wrk is None:
        raise SystemExit("wrk is not installed (apt-get install wrk)")
    command = [wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script)]
    before = target.process.cpu_seconds() if target.process else 0.0
    out = subprocess.run([*command, target.url], capture_output=True, text=True, check=True).stdout
    cpu = (target.process.cpu_seconds() if target.process else 0.0) - before
    if "Non-2xx" in out or "Socket errors" in out:
        raise SystemExit(f"{target.name}: {out}")
    count = int(_found(_WRK_COUNT, out))
    quantiles = {q: float(value) * _MS[unit] for q, value, unit in _WRK_QUANTILE.findall(out)}
    rate = float(_found(_WRK_LINE, out))
    return Requests(rate, cpu / count * 1000, quantiles["50"], quantiles["99"])


def fast_events(target: Target, streams: int, seconds: float) -> float:
    """Events per second of streams that the upstream sends without pauses."""
    events = 0
    selector = DefaultSelector()
    began = time.monotonic()
    end = began + seconds
    for _ in range(streams):
        selector.register(_ask(target, "fast"), EVENT_READ, [0, b""])
    while selector.get_map():
        for key, _ in selector.select(10):
            client: socket.socket = key.fileobj  # type: ignore[assignment]
            data = client.recv(1 << 18)
            if data:
                key.data[0] += data.count(b"data: ")
                key.data[1] = data[-64:]
            if data and b"[DONE]" not in (key.data[1]):
                continue
            # an event cut in two by the reads is not counted, so allow for a few
            if not data or key.data[0] < EVENTS_PER_STREAM * 0.95:
                raise SystemExit(f"{target.name}: a stream broke off after {key.data[0]} events")
            events += EVENTS_PER_STREAM
            selector.unregister(client)
            client.close()
            if time.monotonic() < end:
                selector.register(_ask(target, "fast"), EVENT_READ, [0, b""])
    return events / (time.monotonic() - began)


def first_bytes_ms(target: Target, count: int) -> list[float]:
    """Milliseconds from a request to its first event, for one stream at a time."""
    found = []
    for _ in range(count):
        began = time.monotonic_ns()
        with _ask(target, "paced 2 1 0") as client:
            received = b""
            while b'"sent":' not in received:
                data = client.recv(65536)
                if not data:
                    raise SystemExit(f"{target.name}: {received!r}")
                received += data
            found.append((time.monotonic_ns() - began) / 1e6)
            while b"[DONE]" not in received:
                received += client.recv(65536)
    return found


def disconnects_ms(target: Target, paced_port: int, clients: int, *, prefill: bool) -> list[float]:
    """Milliseconds until the upstream notices each client's disconnect; inf: it never does."""
    take_disconnects(paced_port)
    bench = "paced 1000 10 60000" if prefill else "paced 6000 10 0"
    opened = [_ask(target, bench) for _ in range(clients)]
    for client in opened:
        if not prefill:
            client.recv(65536)
    time.sleep(0.3)
    found = []
    for client in opened:
        closed = time.monotonic_ns()
        client.close()
        deadline = time.monotonic() + 5
        noticed: list[int] = []
        while not noticed and time.monotonic() < deadline:
            time.sleep(0.02)
            noticed = take_disconnects(paced_port)
        found.append((noticed[0] - closed) / 1e6 if noticed else float("inf"))
    return found


def take_disconnects(paced_port: int) -> list[int]:
    """The times of the disconnects since the last call, in nanoseconds (time.monotonic_ns())."""
    url = f"http://127.0.0.1:{paced_port}/disconnects"
    found: list[int] = json.load(urllib.request.urlopen(url, timeout=10))
    return found


@contextmanager
def event_readers(target: Target, count: int) -> Iterator[None]:
    """Run this many readers of ``/debug/stream``, each a curl process."""
    curl = ["curl", "-sN", "-H", f"Authorization: Bearer {KEY}", "-o", "/dev/null"]
    url = f"http://127.0.0.1:{target.port}/debug/stream"
    readers = [subprocess.Popen([*curl, url]) for _ in range(count)]
    time.sleep(1)
    try:
        yield
    finally:
        for reader in readers:
            reader.terminate()
        for reader in readers:
            reader.wait(10)


def start_seconds(folder: Path) -> float:
    """Seconds from the start of ``lmstudio-gateway serve`` to its first response to ``/health``."""
    port = free_port()
    process = Process(
        [sys.executable, "-m", "gateway", "serve"],
        folder / "start.out",
        PYTHONPATH=str(Path(__file__).parents[1]),
        GATEWAY_PORT=str(port),
        LMSTUDIO_BASE_URL="http://127.0.0.1:9",
        STATE_URL=f"sqlite:///{folder}/start.db",
        WEB_CONCURRENCY="2",
    )
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                return time.monotonic() - process.started
            except OSError:
                time.sleep(0.01)
    finally:
        process.stop()


def median(values: list[float]) -> float:
    return statistics.median(values)


def _ask(target: Target, bench: str) -> socket.socket:
    """Send a streaming chat on a connection of its own."""
    body = b'{"stream":true,"messages":[{"role":"user","content":"hello"}]}'
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nX-Bench: {bench}\r\n\r\n"
    )
    client = socket.create_connection(("127.0.0.1", target.port), 30)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.sendall(head.encode() + body)
    return client


def _found(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    if match is None:
        raise SystemExit(text)
    return match[1]
