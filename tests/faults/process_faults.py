"""Faults of the gateway's own processes: signals, deaths, limits. Each returns a :class:`Row`."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from tests.faults.stage import (
    MODEL,
    Crowd,
    Patched,
    Row,
    Stream,
    ask,
    fragile_disk,
    healed,
    locked,
    serves,
    small_disk,
    streams,
    tracebacks,
)
from tests.processes import Gateway, Simulator, eventually

ACTIVATE = "/admin/models/activate"


def reload_under_load(
    folder: Path, simulator: Simulator, clients: int = 64, requests: int = 5000
) -> Row:
    """SIGHUP again and again while clients ask without a pause."""
    gateway = Gateway(folder, simulator.url)
    crowd = Crowd(gateway.port, clients)
    reloads, times = 0, []
    try:
        while crowd.done < requests or reloads < 2:
            before = set(gateway.workers())
            asked = crowd.done
            gateway.process.send_signal(signal.SIGHUP)
            began = time.monotonic()
            eventually(lambda before=before: _replaced(gateway, before), 60)
            times.append(time.monotonic() - began)
            reloads += 1
            goal = asked + requests // 4
            eventually(lambda goal=goal: crowd.done >= goal, 120)
    finally:
        crowd.stop()
        gateway.stop()
    lost = f"{len(crowd.failures)} of {crowd.done} requests, {clients} clients, {reloads} reloads"
    return Row("SIGHUP under load", lost, f"{max(times):.1f} s", crowd.failures[:10])


def drain(folder: Path, simulator: Simulator, count: int = 16) -> Row:
    """SIGTERM while streams run that end within the grace period."""
    gateway = Gateway(folder, simulator.url)
    running = streams(gateway.port, count, count=60, pace_ms=50)
    took = _terminate(gateway, 45)
    for one in running:
        one.join()
    problems = [repr(one.text[-200:]) for one in running if not one.complete]
    lost = f"{len(problems)} of {count} streams"
    if took > 20:
        problems.append("kept connections were waited for after their streams of 3 s had ended")
    return Row("SIGTERM, streams that end in time", lost, f"ended in {took:.1f} s", problems)


def deadline(folder: Path, simulator: Simulator, count: int = 8) -> Row:
    """SIGTERM while streams run that would not end within the grace period (of 5 s here)."""
    gateway = Patched(folder, simulator.url, before="server.GRACEFUL_TIMEOUT = 5")
    running = streams(gateway.port, count, count=5000, pace_ms=50)
    took = _terminate(gateway, 30)
    for one in running:
        one.join()
    untold = [repr(one.text[-200:]) for one in running if not one.told]
    lost = f"{count} streams, {count - len(untold)} of them told so in an error event"
    return Row("SIGTERM, streams beyond the grace period", lost, f"ended in {took:.1f} s", untold)


def worker_killed(folder: Path, simulator: Simulator, count: int = 24) -> Row:
    """kill -9 of one of two workers in the middle of streams."""
    gateway = Gateway(folder, simulator.url)
    try:
        running = _on_both(gateway, count)
        victim = gateway.workers()[0]
        own = _clients_of(victim, gateway.port)
        os.kill(victim, signal.SIGKILL)
        again = healed(lambda: _whole(gateway, victim) and serves(gateway.port))
        for one in running:
            one.join()
    finally:
        gateway.stop()
    lost = [one for one in running if not one.complete]
    problems = [] if len(lost) == own else [f"{len(lost)} lost, but the worker had {own}"]
    told = f"{len(lost)} of {len(running)} streams: its own {own}"
    return Row("kill -9 of a worker", told, again, problems)


def descriptors_exhausted(folder: Path, simulator: Simulator) -> Row:
    """More connections than the worker may have open files."""
    limit = "resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))"
    gateway = Patched(folder, simulator.url, inside=limit, WEB_CONCURRENCY=1)
    workers, problems, seen = gateway.workers(), [], set()
    idle: list[socket.socket] = []
    try:
        assert serves(gateway.port)
        for _ in range(100):
            idle.append(socket.create_connection(("127.0.0.1", gateway.port), 10))
            idle[-1].sendall(b"GET /v1/models HTTP/1.1\r\n")
        for _ in range(6):
            status, told = ask(gateway.port, 1)
            seen.add(status)
            if status not in (0, 200, 503) or (status == 503 and "error" not in told):
                problems.append(f"{status} {told}")
        for one in idle:
            one.close()
        again = healed(lambda: serves(gateway.port))
        if gateway.workers() != workers:
            problems.append("the worker was restarted")
        # gevent says in the log that it can't accept: noise, no harm
        problems += tracebacks(gateway, "Too many open files")
    finally:
        for one in idle:
            one.close()
        gateway.stop()
    waited = "new requests waited or got 503" if seen <= {0, 200, 503} else str(sorted(seen))
    return Row("no file descriptors left", f"{waited}; no crash", again, problems)


def upstream_descriptors_exhausted(folder: Path, simulator: Simulator, clients: int = 40) -> Row:
    """More exchanges than there are descriptors for both their sides."""
    limit = "resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))"
    gateway = Patched(folder, simulator.url, inside=limit, WEB_CONCURRENCY=1)
    workers = gateway.workers()
    try:
        assert serves(gateway.port)
        crowd = Crowd(gateway.port, clients)
        eventually(lambda: crowd.done >= clients * 5, 90)
        crowd.stop()
        again = healed(lambda: serves(gateway.port))
        problems = [one for one in crowd.failures if not one.startswith("503")][:5]
        if gateway.workers() != workers:
            problems.append("the worker was restarted")
        problems += tracebacks(gateway, "Too many open files")
    finally:
        gateway.stop()
    lost = f"{len(crowd.failures)} of {crowd.done} requests, all of them 503"
    return Row("too few descriptors for a crowd", lost, again, problems)


#: More than what is free in SQLite's files while the disk is full.
_LARGE = {"stopStrings": [f"{number:0500}" for number in range(60)]}
#: Without a model: the active one answers.
_UNNAMED = {"messages": [{"role": "user", "content": "count to 2"}]}
_SICK_STATES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "full": ("the state's disk is full", small_disk),
    "readonly": ("the state's disk becomes read-only", fragile_disk),
    "locked": ("the state is locked by another", lambda folder: locked(folder / "state.db")),
}


def state(folder: Path, simulator: Simulator, how: str) -> Row:
    """The state can't be written (see _SICK_STATES), and a worker dies meanwhile."""
    what, stage = _SICK_STATES[how]
    health = {"method": "GET", "path": "/health"}

    def activate(**defaults: Any) -> tuple[int, Any]:
        body = {"modelKey": MODEL, "defaultInference": defaults}
        return ask(gateway.port, path=ACTIVATE, body=body)

    with stage(folder / "state") as change:
        (folder / "state").mkdir(exist_ok=True, parents=True)
        url = f"sqlite:///{folder}/state/state.db"
        gateway = Gateway(folder / "gateway", simulator.url, STATE_URL=url)
        (victim, other), problems = gateway.workers(), []
        try:
            if activate()[0] != 200:
                problems.append("no activation while all is well")
            change(how)
            if not serves(gateway.port):
                problems.append("inference was not served")
            with ThreadPoolExecutor(3) as pool:
                got = list(pool.map(lambda _: activate(**_LARGE), range(3)))
            problems += [f"an activation was answered {one}" for one in got if not _refused(one)]
            eventually(lambda: ask(gateway.port, **health)[1]["status"] == "degraded", 30)
            os.kill(victim, signal.SIGKILL)
            eventually(lambda: _whole(gateway, victim) and serves(gateway.port), 60)
            unnamed = {ask(gateway.port, body=_UNNAMED)[0] for _ in range(20)}
            if unnamed != {200}:
                problems.append(f"with the active model inference was answered {unnamed}")
            if other not in gateway.workers():
                problems.append("a worker was restarted")
            if how == "readonly":  # such a disk must be let go before it can be repaired
                gateway.stop()
            change("well")
            if how == "readonly":
                gateway.start()
            again = healed(lambda: all(activate(**_LARGE)[0] == 200 for _ in range(8)))
            eventually(lambda: ask(gateway.port, **health)[1]["status"] == "ok", 30)
            problems += tracebacks(gateway)
        finally:
            gateway.stop()
    refused = sum(map(_refused, got))
    lost = f"no inference; {refused} of {len(got)} activations (503)"
    return Row(what, lost, "by a restart" if how == "readonly" else again, problems)


def _refused(answer: tuple[int, Any]) -> bool:
    """Whether a request was refused in words as the state can't be used."""
    status, told = answer
    return status == 503 and "shared state" in told["error"]


def _on_both(gateway: Gateway, count: int) -> list[Stream]:
    """Streams, so many more at a time until each worker has some."""
    running: list[Stream] = []

    def spread() -> bool:
        with ThreadPoolExecutor(count) as pool:
            opened = [pool.submit(Stream, gateway.port, 100, 50) for _ in range(count)]
        running.extend(one.result() for one in opened)
        eventually(lambda: all(one.begun for one in running), 60)
        return all(_clients_of(worker, gateway.port) for worker in gateway.workers())

    eventually(spread, 30)
    return running


def _terminate(gateway: Gateway, timeout: float) -> float:
    """SIGTERM; the time until the process has ended."""
    began = time.monotonic()
    gateway.process.send_signal(signal.SIGTERM)
    gateway.process.wait(timeout)
    return time.monotonic() - began


def _replaced(gateway: Gateway, before: set[int]) -> bool:
    now = set(gateway.workers())
    return len(now - before) == 2 and not now & before


def _whole(gateway: Gateway, victim: int) -> bool:
    now = gateway.workers()
    return len(now) == 2 and victim not in now


def _clients_of(worker: int, port: int) -> int:
    """How many client connections a worker has."""
    found = psutil.Process(worker).net_connections("tcp")
    return sum(one.laddr.port == port and one.status == psutil.CONN_ESTABLISHED for one in found)
