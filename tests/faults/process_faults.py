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

from tests.faults.harness import (
    MODEL,
    BusyClients,
    Patched,
    Row,
    Stream,
    ask,
    fragile_disk,
    locked_database,
    recovery,
    serves,
    small_disk,
    start_streams,
    tracebacks,
)
from tests.processes import Gateway, Simulator, eventually


def reload_under_load(
    folder: Path, simulator: Simulator, clients: int = 64, requests: int = 5000
) -> Row:
    """SIGHUP again and again, each with new settings, while clients send without a pause."""
    gateway = Gateway(folder, simulator.url)
    workers = gateway.workers()
    busy = BusyClients(gateway.port, clients)
    reloads, times = 0, []
    try:
        while busy.done < requests or reloads < 2:
            done = busy.done
            origin = f"https://page-{reloads}.example"
            (folder / ".env").write_text(f"CORS_ORIGINS={origin}\n")
            gateway.process.send_signal(signal.SIGHUP)
            began = time.monotonic()
            eventually(lambda origin=origin: _obey(gateway, origin), 60)
            times.append(time.monotonic() - began)
            reloads += 1
            goal = done + requests // 4
            eventually(lambda goal=goal: busy.done >= goal, 120)
        problems = [] if gateway.workers() == workers else ["workers were replaced"]
    finally:
        busy.stop()
        gateway.stop()
    lost = f"{len(busy.failures)} of {busy.done} requests, {clients} clients, {reloads} reloads"
    problems += busy.failures[:10]
    return Row("SIGHUP under load", lost, f"{max(times):.1f} s", problems)


def drain(folder: Path, simulator: Simulator, count: int = 16) -> Row:
    """SIGTERM while streams are in flight that end within the grace period."""
    gateway = Gateway(folder, simulator.url)
    running = start_streams(gateway.port, count, count=60, pace_ms=50)
    took = _terminate(gateway, 45)
    for one in running:
        one.join()
    problems = [repr(one.text[-200:]) for one in running if not one.complete]
    lost = f"{len(problems)} of {count} streams"
    if took > 28:  # the grace period is 30 s
        problems.append("the gateway waited for idle connections after streams of 3 s had ended")
    return Row("SIGTERM, streams that end in time", lost, f"ended in {took:.1f} s", problems)


def deadline(folder: Path, simulator: Simulator, count: int = 8) -> Row:
    """SIGTERM while streams are in flight that would outlast the grace period (5 s here)."""
    gateway = Patched(folder, simulator.url, before="launch.GRACEFUL_TIMEOUT = 5")
    running = start_streams(gateway.port, count, count=5000, pace_ms=50)
    took = _terminate(gateway, 30)
    for one in running:
        one.join()
    problems = [repr(one.text[-200:]) for one in running if not one.ended_with_error]
    lost = f"{count} streams, {count - len(problems)} with an error event"
    return Row("SIGTERM, streams beyond the grace period", lost, f"ended in {took:.1f} s", problems)


def worker_killed(folder: Path, simulator: Simulator, count: int = 24) -> Row:
    """kill -9 of one of two workers during streams."""
    gateway = Gateway(folder, simulator.url)
    try:
        running = _streams_on_both_workers(gateway, count)
        victim = gateway.workers()[0]
        ports = _client_ports(victim, gateway.port)
        own = [one for one in running if one.port in ports and not one.complete]
        os.kill(victim, signal.SIGKILL)
        recovered = recovery(lambda: _has_two_workers(gateway, victim) and serves(gateway.port))
        for one in running:
            one.join()
    finally:
        gateway.stop()
    lost = [one for one in running if not one.complete]
    problems = [] if lost == own else [f"{len(lost)} lost, but the worker had {len(own)}"]
    summary = f"{len(lost)} of {len(running)} streams: the worker's own {len(own)}"
    return Row("kill -9 of a worker", summary, recovered, problems)


def descriptors_exhausted(folder: Path, simulator: Simulator) -> Row:
    """More connections than the worker may have file descriptors."""
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
            status, body = ask(gateway.port, 1)
            seen.add(status)
            if status not in (0, 200, 503) or (status == 503 and "error" not in body):
                problems.append(f"{status} {body}")
        for one in idle:
            one.close()
        recovered = recovery(lambda: serves(gateway.port))
        if gateway.workers() != workers:
            problems.append("the worker was restarted")
        # gevent logs that it can't accept connections, which does no harm
        problems += tracebacks(gateway, "Too many open files")
    finally:
        for one in idle:
            one.close()
        gateway.stop()
    waited = "new requests waited or got 503" if seen <= {0, 200, 503} else str(sorted(seen))
    return Row("no file descriptors left", f"{waited}; no crash", recovered, problems)


def upstream_descriptors_exhausted(folder: Path, simulator: Simulator, clients: int = 40) -> Row:
    """Too few file descriptors for the client and the upstream side of all exchanges."""
    limit = "resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))"
    gateway = Patched(folder, simulator.url, inside=limit, WEB_CONCURRENCY=1)
    workers = gateway.workers()
    try:
        assert serves(gateway.port)
        busy = BusyClients(gateway.port, clients)
        eventually(lambda: busy.done >= clients * 5, 90)
        busy.stop()
        recovered = recovery(lambda: serves(gateway.port))
        problems = [one for one in busy.failures if not one.startswith("503")][:5]
        if gateway.workers() != workers:
            problems.append("the worker was restarted")
        problems += tracebacks(gateway, "Too many open files")
    finally:
        gateway.stop()
    lost = f"{len(busy.failures)} of {busy.done} requests, all of them got 503"
    return Row("too few file descriptors", lost, recovered, problems)


#: More than the free space in SQLite's own files, which a full disk leaves usable.
_LARGE = {"stopStrings": [f"{number:0500}" for number in range(60)]}
#: A chat that names no model and goes to the active one.
_WITHOUT_MODEL = {"messages": [{"role": "user", "content": "count to 2"}]}
_BROKEN_STATES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "full": ("the state's disk is full", small_disk),
    "readonly": ("the state's disk becomes read-only", fragile_disk),
    "locked": (
        "the state is locked by another process",
        lambda folder: locked_database(folder / "state.db"),
    ),
}


def state(folder: Path, simulator: Simulator, how: str) -> Row:
    """A worker dies while the state can't be written (see ``_BROKEN_STATES``)."""
    fault, breakable = _BROKEN_STATES[how]
    with breakable(folder / "state") as change:
        (folder / "state").mkdir(exist_ok=True, parents=True)
        url = f"sqlite:///{folder}/state/state.db"
        gateway = Gateway(folder / "gateway", simulator.url, STATE_URL=url)
        try:
            before = _activate(gateway)[0]
            problems = [] if before == 200 else ["an activation failed before the fault"]
            change(how)
            responses = _use_broken_state(gateway, problems)
            if how == "readonly":  # the disk can't be repaired while it is in use
                gateway.stop()
            change("repaired")
            if how == "readonly":
                gateway.start()
            recovered = recovery(
                lambda: all(_activate(gateway, **_LARGE)[0] == 200 for _ in range(8))
            )
            eventually(lambda: _health(gateway) == "ok", 30)
            problems += tracebacks(gateway)
        finally:
            gateway.stop()
    failed = sum(map(_failed, responses))
    lost = f"no inference; {failed} of {len(responses)} activations (503)"
    return Row(fault, lost, "by a restart" if how == "readonly" else recovered, problems)


def _use_broken_state(gateway: Gateway, problems: list[str]) -> list[tuple[int, Any]]:
    """Infer, activate and kill a worker; returns the responses to the activations."""
    victim, other = gateway.workers()
    if not serves(gateway.port):
        problems.append("inference failed")
    with ThreadPoolExecutor(3) as pool:
        responses = list(pool.map(lambda _: _activate(gateway, **_LARGE), range(3)))
    problems += [f"an activation got {one}" for one in responses if not _failed(one)]
    eventually(lambda: _health(gateway) == "degraded", 30)
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: _has_two_workers(gateway, victim) and serves(gateway.port), 60)
    statuses = {ask(gateway.port, body=_WITHOUT_MODEL)[0] for _ in range(20)}
    if statuses != {200}:
        problems.append(f"inference with the active model got {statuses}")
    if other not in gateway.workers():
        problems.append("a worker was restarted")
    return responses


def _activate(gateway: Gateway, **defaults: Any) -> tuple[int, Any]:
    body = {"modelKey": MODEL, "defaultInference": defaults}
    return ask(gateway.port, path="/admin/models/activate", body=body)


def _health(gateway: Gateway) -> Any:
    """The status that /health reports."""
    return ask(gateway.port, method="GET", path="/health")[1]["status"]


def _failed(response: tuple[int, Any]) -> bool:
    """Whether a request failed because of the shared state, and its error says so."""
    status, body = response
    return status == 503 and "shared state" in body["error"]


def _streams_on_both_workers(gateway: Gateway, count: int) -> list[Stream]:
    """Open ``count`` streams at a time until both workers have some."""
    running: list[Stream] = []

    def spread() -> bool:
        with ThreadPoolExecutor(count) as pool:
            opened = [pool.submit(Stream, gateway.port, 200, 50) for _ in range(count)]
        running.extend(one.result() for one in opened)
        eventually(lambda: all(one.started for one in running), 60)
        return all(_client_ports(worker, gateway.port) for worker in gateway.workers())

    eventually(spread, 30)
    return running


def _terminate(gateway: Gateway, timeout: float) -> float:
    """Send SIGTERM. Returns the seconds until the process has exited."""
    began = time.monotonic()
    gateway.process.send_signal(signal.SIGTERM)
    gateway.process.wait(timeout)
    return time.monotonic() - began


def _obey(gateway: Gateway, origin: str) -> bool:
    """Whether ten requests of this origin in a row are admitted, whichever workers serve them."""
    request: dict[str, Any] = {"method": "GET", "path": "/openapi.json"}
    return all(
        ask(gateway.port, 10, **request, headers={"Origin": origin})[0] == 200 for _ in range(10)
    )


def _has_two_workers(gateway: Gateway, victim: int) -> bool:
    now = gateway.workers()
    return len(now) == 2 and victim not in now


def _client_ports(worker: int, port: int) -> set[int]:
    """The clients' ports of a worker's connections to clients."""
    found = psutil.Process(worker).net_connections("tcp")
    return {one.raddr.port for one in found if one.raddr and one.laddr.port == port}
