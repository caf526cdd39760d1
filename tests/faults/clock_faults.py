"""Jumps of the wall clock, for the gateway and for Redis. Each returns a :class:`Row`.

clock.c shifts the wall clock of the processes; their steady clock goes on, as on a real machine.
(libfaketime 0.9.10, which Debian has, breaks absolute sleeps on the steady clock, such as Python's
``time.sleep`` and thus gunicorn's master, and Redis does not start with it.)
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gateway.state import MAX_EVENTS
from tests.conftest import EventReader
from tests.faults.harness import MODEL, BusyClients, Row, ask, serves, start_streams, tracebacks
from tests.nginx import require
from tests.processes import Gateway, Simulator, eventually, free_port

HOUR = 3600
#: The offsets, one after another: back, ahead, and correct again.
JUMPS = (-HOUR, 24 * HOUR, 0)
#: Seconds between two jumps; workers check each other's heartbeats every second.
BETWEEN = 3.0
_GET = {"method": "GET"}
_IDENTITY = {"modelKey": MODEL, "instanceId": "clockwork"}


class Clock:
    """A wall clock that can jump under running processes, those started with :attr:`environ`."""

    def __init__(self, folder: Path) -> None:
        if sys.platform != "linux":
            pytest.skip("only Linux can shift the clock of a process")
        folder.mkdir(parents=True)
        library, self._file = folder / "clock.so", folder / "offset"
        source = Path(__file__).with_name("clock.c")
        command = (require("cc"), "-shared", "-fPIC", "-o", str(library), str(source))
        subprocess.run(command, check=True)
        self._file.write_bytes(bytes(8))
        self.offset = 0
        self.environ = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(self._file)}

    def jump(self, offset: int) -> None:
        """Shift the clock by ``offset`` seconds."""
        self.offset = offset
        with self._file.open("r+b", buffering=0) as file:
            file.write(struct.pack("=q", offset))

    def shown_by(self, timestamp: str) -> bool:
        """Whether an ISO timestamp was taken with this clock and offset, within a minute."""
        off = datetime.fromisoformat(timestamp) - datetime.now(UTC)
        return abs(off.total_seconds() - self.offset) < 60


def jumps(folder: Path, simulator: Simulator) -> Row:
    """The clock jumps under a gateway with a SQLite state."""
    clock = Clock(folder / "clock")
    gateway = Gateway(folder, simulator.url, PROXY_STREAM_TIMEOUT=30_000, **clock.environ)
    try:
        return _run(clock, gateway, "SQLite")
    finally:
        gateway.stop()


def jumps_with_redis(folder: Path, simulator: Simulator) -> Row:
    """The clock jumps under two gateways and the Redis that they share."""
    clock = Clock(folder / "clock")
    binary, port = require("redis-server"), free_port()
    command = [binary, "--port", str(port), "--save", "", "--appendonly", "no"]
    environ = {**os.environ, **clock.environ}
    redis = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environ)
    settings = {"STATE_URL": f"redis://127.0.0.1:{port}/0", "PROXY_STREAM_TIMEOUT": 30_000}
    gateways: list[Gateway] = []
    try:
        for name in "ab":
            gateways.append(Gateway(folder / name, simulator.url, **settings, **clock.environ))
        return _run(clock, gateways[0], "Redis")
    finally:
        for gateway in gateways:
            gateway.stop()
        redis.kill()
        redis.wait(10)


def _run(clock: Clock, gateway: Gateway, state: str) -> Row:
    problems: list[str] = []
    workers, began = gateway.workers(), time.monotonic()
    live = EventReader(gateway, last_id=0)
    load = {"path": "/admin/models/load", "body": {**_IDENTITY, "ttlSeconds": HOUR}}
    assert ask(gateway.port, **load)[0] == 200
    clients, running = BusyClients(gateway.port, 2), []
    try:
        for offset in JUMPS:
            running += start_streams(gateway.port, 4, count=120, pace_ms=50)
            goal = clients.done + 150
            clock.jump(offset)
            problems += _status_problems(clock, gateway, began)
            time.sleep(BETWEEN)
            eventually(lambda goal=goal: clients.done > goal, 60)
            problems += _status_problems(clock, gateway, began)
    finally:
        clients.stop()
    for one in running:
        one.join()
    problems += [f"a stream broke: {one.text[-200:]!r}" for one in running if not one.complete]
    problems += clients.failures[:10]
    problems += _event_problems(gateway, live, clients.done + len(running))
    if gateway.workers() != workers or not serves(gateway.port):
        problems.append("a worker was restarted or no longer serves")
    problems += tracebacks(gateway)
    lost = f"0 of {clients.done} requests, {len(running)} streams, {len(live.frames)} events"
    fault = f"clock 1 h back, 1 day ahead ({state})"
    return Row(fault, lost if not problems else "see below", "none needed", problems)


def _status_problems(clock: Clock, gateway: Gateway, began: float) -> list[str]:
    """The problems in what the gateway reports about itself."""
    longest = time.monotonic() - began + 60
    health = eventually(lambda: _jumped(clock, gateway), 20)
    status = ask(gateway.port, **_GET, path="/debug/status")[1]
    metrics = ask(gateway.port, **_GET, path="/debug/metrics")[1]
    models = ask(gateway.port, **_GET, path="/admin/models")[1]
    uptimes = [health["uptime"], metrics["system"]["uptime"]]
    elapsed = [one["elapsedMs"] / 1000 for one in status["inFlight"]]
    loaded = [one["ttlMs"] for one in models["loaded"] if one["identifier"] == "clockwork"]
    slowest = metrics["performance"]["maxResponseTimeMs"] or 0  # None: none has ended yet
    checks = {
        f"health: {health}": health["status"] == "ok",
        f"uptimes: {uptimes}": all(0 <= one < longest for one in uptimes),
        f"elapsed: {elapsed}": all(0 <= one < longest for one in elapsed),
        f"times: {metrics['performance']}": slowest < 60_000,
        f"loaded: {models['loaded']}": loaded == [HOUR * 1000],
        f"active: {models['active']}": (models["active"] or {}).get("instanceId") == "clockwork",
    }
    return [f"{clock.offset:+d} s: {what}" for what, correct in checks.items() if not correct]


def _jumped(clock: Clock, gateway: Gateway) -> Any:
    """The body of /health once it shows the jump."""
    health = ask(gateway.port, **_GET, path="/health")[1]
    return health if health and clock.shown_by(health["timestamp"]) else None


def _event_problems(gateway: Gateway, live: EventReader, exchanges: int) -> list[str]:
    """The problems in the events of the exchanges, read live and once more from the log."""
    eventually(lambda: len(live.of("inference_complete")) >= exchanges, 30)
    newest = live.frames[-1].id
    late = EventReader(gateway, last_id=0)
    eventually(lambda: late.frames[-1:] and late.frames[-1].id >= newest, 30)
    for reader in (live, late):
        reader.close()
    received = [(one.id, one.event) for one in live.frames if one.event != "connected"]
    stored = [(one.id, one.event) for one in late.frames if one.event != "connected"]
    checks = {
        "an event is missing or repeated": [id_ for id_, _ in received]
        == list(range(1, newest + 1)),
        "the log dropped events": stored[: len(received)] == received or newest > MAX_EVENTS,
        f"{live.of('error')[:3]}": not live.of("error"),
        "an exchange has no start or no end": len(live.of("inference_start")) == exchanges,
    }
    return [problem for problem, correct in checks.items() if not correct]
