"""Faults of the network to LM Studio, and an LM Studio that does not read.

The gateway waits for a minute at most. Here it waits for seconds, by patched constants.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.faults.harness import (
    Patched,
    Row,
    ask,
    chat,
    recovery,
    serves,
    start_streams,
    tracebacks,
)
from tests.network import Network
from tests.processes import Simulator, eventually

_SEND = "import gateway.lmstudio.sending as s; s.SEND_TIMEOUT = 5.0"
_KEEP_ALIVE = (
    "import gateway.lmstudio.adapter as a; "
    "a.KEEP_ALIVE_IDLE = a.KEEP_ALIVE_INTERVAL = 1; a.DEAD_AFTER = 3; a.CONNECT_TIMEOUT = 1"
)
_LINK = (
    "import gateway.lmstudio.sdk as s; s.KEEP_ALIVE_INTERVAL = 1.0; "
    "import gateway.lmstudio.sessions as t; t.CONNECT_TIMEOUT = 1.0"
)


def never_reads(folder: Path, count: int = 6) -> Row:
    """LM Studio accepts connections and never reads from them."""
    body = chat(3, False, padding="x" * (20 << 20))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        gateway = Patched(folder, address, inside=_SEND, WEB_CONCURRENCY=1)
        try:
            with ThreadPoolExecutor(count) as pool:
                waiting = [pool.submit(_send, gateway.port, body) for _ in range(count)]
                status = ask(gateway.port, method="GET", path="/openapi.json")[0]
                problems = [] if status == 200 else [f"another client got {status}"]
                if any(one.done() for one in waiting):
                    problems.append("another client waited as long as these")
                statuses = [one.result(60) for one in waiting]
            problems += [f"a request got {one}" for one in statuses if one != 504]
            problems += tracebacks(gateway)
        finally:
            gateway.stop()
    lost = f"{count} requests, {statuses.count(504)} of them got 504"
    return Row("LM Studio does not read", lost, "none needed", problems)


def network_down_during_streams(folder: Path, simulator: Simulator, count: int = 12) -> Row:
    network = Network(simulator.port)
    gateway = Patched(folder, network.url, inside=_KEEP_ALIVE)
    workers = gateway.workers()
    try:
        running = start_streams(gateway.port, count, count=2000)
        network.cut()
        for one in running:
            one.join()
        problems = [repr(one.text[-200:]) for one in running if not one.ended_with_error]
        network.restore()
        recovered = recovery(lambda: serves(gateway.port))
        if gateway.workers() != workers:
            problems.append("a worker was restarted")
        problems += tracebacks(gateway)
    finally:
        gateway.stop()
        network.stop()
    lost = f"{count} streams, {count - len(problems)} with an error event"
    return Row("network down during streams", lost, recovered, problems)


def network_down_during_load(folder: Path, simulator: Simulator) -> Row:
    network = Network(simulator.port)
    gateway = Patched(folder, network.url, inside=_LINK, WEB_CONCURRENCY=1, SDK_RETRY_DELAY=10)
    listing: dict[str, Any] = {"method": "GET", "path": "/admin/models"}
    load: dict[str, Any] = {"path": "/admin/models/load", "body": {"modelKey": _SLOW}}
    problems = []
    try:
        assert ask(gateway.port, **listing)[0] == 200
        simulator.faults(load_ms=60_000)
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(ask, gateway.port, **load)
            eventually(lambda: [one for one in simulator.state()["loads"] if one["progress"] > 0])
            network.cut()
            status, body = loading.result(30)
        if status != 503:
            problems.append(f"the load got {status} {body}")
        network.restore()
        recovered = recovery(lambda: ask(gateway.port, **listing)[0] == 200)
        problems += tracebacks(gateway)
    finally:
        gateway.stop()
        network.stop()
    return Row("network down during a load", f"the load, which got {status}", recovered, problems)


_SLOW = "llama-3.3-70b-instruct"


def _send(port: int, body: bytes) -> int:
    """The status of a chat, sent without its JSON being parsed again."""
    with socket.create_connection(("127.0.0.1", port), 60) as client:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        received = client.recv(65536)
    return int(received.split(b" ", 2)[1]) if received else 0
