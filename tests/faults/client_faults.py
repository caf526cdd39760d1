"""Faults of clients: those that do not read, flood, abandon or never speak. Each returns a
:class:`Row`."""

from __future__ import annotations

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil

from tests.faults.harness import CHAT, Patched, Row, ask, chat, recovery, serves, tracebacks
from tests.processes import Gateway, Simulator, eventually, eventually_equal

#: Makes the server's side of each connection hold little, so that a client soon counts as stalled.
_SMALL_BUFFERS = """import socket, gateway.serving.connection as connection
    def small(self, sock, *more, plain=connection.Connection.__init__):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        plain(self, sock, *more)
    connection.Connection.__init__ = small"""
#: Replaces standard error by a pipe that nobody reads, once the worker has reported that it is up.
_UNREAD_STDERR = """import gevent, os
    gevent.spawn_later(1, lambda: os.dup2(os.pipe()[1], 2))"""


def _deaf(port: int) -> socket.socket:
    """A connection whose client's side holds little and is not read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(10)
    client.connect(("127.0.0.1", port))
    return client


def slow_reader(folder: Path, simulator: Simulator, clients: int = 8) -> Row:
    """Clients that do not read their streams; the gateway waits for 2 s here, not for 60 s."""
    inside = f"{_SMALL_BUFFERS}\n    import gateway.serving.response as r; r.SEND_TIMEOUT = 2.0"
    gateway = Patched(folder, simulator.url, inside=inside, WEB_CONCURRENCY=1)
    body = chat(100_000, True)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nX-Simulator-Pace-Ms: 0.1\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    problems = []
    with ExitStack() as stack:
        stack.callback(gateway.stop)
        for _ in range(clients):
            stack.enter_context(_deaf(gateway.port)).sendall(request)
        eventually_equal(lambda: len(_in_flight(simulator)), clients)
        if not serves(gateway.port):
            problems.append("other clients were not served")
        took = recovery(lambda: not _in_flight(simulator), 40)
        eventually_equal(lambda: gateway.logged().count("status=499"), clients)
        problems += tracebacks(gateway)
    return Row("clients that do not read", f"their {clients} streams (499)", took, problems)


def unread_events(folder: Path, simulator: Simulator, readers: int = 4) -> Row:
    """SIGTERM while readers of the event stream do not read."""
    gateway = Patched(folder, simulator.url, inside=_SMALL_BUFFERS, WEB_CONCURRENCY=1)
    with ExitStack() as stack:
        stack.callback(gateway.stop)
        for _ in range(readers):
            reader = stack.enter_context(_deaf(gateway.port))
            reader.sendall(b"GET /debug/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        eventually(lambda: _blocked_bytes(gateway) >= 0)
        for _ in range(150):
            ask(gateway.port)
        eventually(lambda: _blocked_bytes(gateway) > readers * 1000)
        began = time.monotonic()
        gateway.process.send_signal(signal.SIGTERM)
        gateway.process.wait(45)
        took = time.monotonic() - began
        problems = tracebacks(gateway)
    if took > 28:  # the grace period is 30 s
        problems.append("the gateway waited for readers that do not read")
    return Row("SIGTERM, event streams not read", "nothing", f"ended in {took:.1f} s", problems)


def flood_with_full_stderr(folder: Path, simulator: Simulator, requests: int = 4000) -> Row:
    """Malformed and ordinary requests while nobody reads the gateway's standard error."""
    gateway = Patched(folder, simulator.url, inside=_UNREAD_STDERR, WEB_CONCURRENCY=1)
    (worker,) = gateway.workers()
    problems = []
    try:
        eventually(lambda: os.readlink(f"/proc/{worker}/fd/2").startswith("pipe:"))
        with ThreadPoolExecutor(4) as pool:
            statuses = list(pool.map(lambda n: _malformed(gateway.port, n % 3), range(requests)))
        rejected = sum(status == 400 for status in statuses)
        if rejected != requests:
            problems.append(f"{requests - rejected} of {requests} got no 400")
        for _ in range(1000):  # a line of the access log each
            if ask(gateway.port, 10, "GET", "/openapi.json")[0] != 200:
                problems.append("an ordinary request was not served")
                break
        took = recovery(lambda: ask(gateway.port, 1, "GET", "/health")[0] == 200)
        if gateway.workers() != [worker]:
            problems.append("the worker was restarted")
    finally:
        gateway.stop()
    return Row("flood of malformed requests, stderr full", "log lines", took, problems)


def abandoned(folder: Path, simulator: Simulator, connections: int = 10_000) -> Row:
    """Connections that are opened and abandoned, half of them in the middle of a head."""
    gateway = Gateway(folder, simulator.url, WEB_CONCURRENCY=1)
    (worker,) = gateway.workers()
    problems = []
    try:
        assert serves(gateway.port)
        before = psutil.Process(worker).num_fds()
        for _ in range(connections // 250):
            batch = [socket.create_connection(("127.0.0.1", gateway.port), 30) for _ in range(250)]
            for one in batch[::2]:
                one.sendall(b"GET /v1/models HTTP/1.1\r\nHost:")
            for one in batch:
                one.close()
        took = recovery(lambda: psutil.Process(worker).num_fds() <= before + 5, 30)
        if not serves(gateway.port):
            problems.append("other clients were not served")
        if gateway.workers() != [worker]:
            problems.append("the worker was restarted")
        problems += tracebacks(gateway)
    finally:
        gateway.stop()
    return Row(f"{connections:,} connections abandoned", "nothing", took, problems)


def silent(folder: Path, simulator: Simulator, connections: int = 320, limit: int = 300) -> Row:
    """More connections that never send anything than there are descriptors."""
    inside = f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))"
    gateway = Patched(folder, simulator.url, inside=inside, WEB_CONCURRENCY=1)
    workers = gateway.workers()
    problems = []
    with ExitStack() as stack:
        stack.callback(gateway.stop)
        for _ in range(connections):
            stack.enter_context(socket.create_connection(("127.0.0.1", gateway.port), 10))
        statuses = {ask(gateway.port, 5)[0] for _ in range(20)}
        if statuses != {200}:
            problems.append(f"other clients got {statuses}")
        took = recovery(lambda: serves(gateway.port))
        if gateway.workers() != workers:
            problems.append("the worker was restarted")
        problems += tracebacks(gateway)
    fault = f"{connections} silent connections, {limit} descriptors"
    return Row(fault, "those idle for longest", took, problems)


def _in_flight(simulator: Simulator) -> list[object]:
    running = [one for one in simulator.requests() if one["endedMs"] is None]
    return [one for one in running if one["target"] == CHAT]


def _blocked_bytes(gateway: Gateway) -> int:
    """Bytes that wait in the kernel to be sent to the gateway's clients; -1 without a client."""
    lines = Path(f"/proc/{gateway.process.pid}/net/tcp").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    local = f":{gateway.port:04X}"
    queued = [int(row[4][:8], 16) for row in rows if row[1].endswith(local) and row[3] == "01"]
    return sum(queued) if queued else -1


def _malformed(port: int, kind: int) -> int:
    """The status of a malformed request."""
    data = (b"GET /v1 HTTP/1.1\r\n\r\n", b"G\x00T\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n")
    try:
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(data[kind])
            return int(client.recv(65536)[9:12] or 0)
    except OSError:
        return 0
