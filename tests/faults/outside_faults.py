"""Faults of what the gateway depends on: LM Studio and Redis. Each returns a :class:`Row`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.faults.stage import MODEL, Row, ask, healed, serves, streams, tracebacks
from tests.nginx import require
from tests.processes import Gateway, Simulator, eventually, free_port

#: Statuses that the contract gives to requests that LM Studio leaves.
_OUTAGE = {502, 503, 504}


def _crash(simulator: Simulator) -> None:
    simulator.process.kill()
    simulator.process.wait(10)
    assert simulator.process.stdout is not None
    simulator.process.stdout.close()
    simulator.http.close()


def _crash_while(
    folder: Path, fault: str, play: Callable[[Gateway, Callable[[], None]], tuple[str, list[str]]]
) -> Row:
    """Kill LM Studio where ``play`` says so, and bring it back on its port."""
    simulator = Simulator(0, "--pace-ms", "20")
    gateway = Gateway(folder, simulator.url)
    workers = gateway.workers()
    try:
        assert serves(gateway.port)
        lost, problems = play(gateway, lambda: _crash(simulator))
        status, told = ask(gateway.port)
        if (status, told and told["error"]["code"]) != (503, "lmstudio_unreachable"):
            problems.append(f"with LM Studio gone: {status} {told}")
        status, told = ask(gateway.port, method="GET", path="/health")
        if (status, told and told["status"]) != (200, "degraded"):
            problems.append(f"health with LM Studio gone: {status} {told}")
        simulator = Simulator(simulator.port, "--pace-ms", "20")
        listing = {"method": "GET", "path": "/admin/models"}
        again = healed(
            lambda: (
                serves(gateway.port)
                and all(ask(gateway.port, **listing)[0] == 200 for _ in range(10))
            )
        )
        if gateway.workers() != workers:
            problems.append("a worker was restarted")
        problems += tracebacks(gateway)
    finally:
        gateway.stop()
        if simulator.process.poll() is None:
            simulator.stop()
    return Row(f"LM Studio killed {fault}", lost, again, problems)


def killed_in_streams(folder: Path, count: int = 12) -> Row:
    def play(gateway: Gateway, crash: Callable[[], None]) -> tuple[str, list[str]]:
        running = streams(gateway.port, count, count=2000)
        crash()
        for one in running:
            one.join()
        untold = [repr(one.text[-200:]) for one in running if not one.told]
        return f"{count} streams, {count - len(untold)} told so in an error event", untold

    return _crash_while(folder, "in the middle of streams", play)


def killed_in_answers(folder: Path, count: int = 12) -> Row:
    def play(gateway: Gateway, crash: Callable[[], None]) -> tuple[str, list[str]]:
        headers = {"X-Simulator-Prefill-Ms": "60000"}
        with ThreadPoolExecutor(count) as pool:
            asked = [pool.submit(ask, gateway.port, headers=headers) for _ in range(count)]
            status = {"method": "GET", "path": "/debug/status"}
            eventually(lambda: len((ask(gateway.port, **status)[1] or {})["inFlight"]) >= count, 30)
            crash()
            got = [one.result(60) for one in asked]
        odd = [f"{status} {told}" for status, told in got if status != 502]
        return f"{count} requests, {count - len(odd)} of them answered 502", odd

    return _crash_while(folder, "while requests wait", play)


def killed_in_load(folder: Path) -> Row:
    def play(gateway: Gateway, crash: Callable[[], None]) -> tuple[str, list[str]]:
        body = {"modelKey": "qwen2.5-7b-instruct", "instanceId": "doomed"}
        load: dict[str, Any] = {"path": "/admin/models/load", "body": body}
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, gateway.port, **load)
            state = {"method": "GET", "path": "/debug/status"}

            def loading() -> bool:
                told = ask(gateway.port, **state)[1] or {}
                return asked.done() or told.get("status") == "loading_model"

            eventually(loading, 30)
            early = asked.done()
            crash()
            status, told = asked.result(60)
        problems = ["the load ended before the crash"] if early else []
        if not early and status not in _OUTAGE:
            problems.append(f"the load was answered {status} {told}")
        return f"the load, answered {status}", problems

    return _crash_while(folder, "in the middle of a load", play)


def frozen(folder: Path) -> Row:
    """LM Studio is stopped (SIGSTOP): connections open, nothing is answered."""
    simulator = Simulator(0, "--pace-ms", "1")
    gateway = Gateway(folder, simulator.url, PROXY_TIMEOUT=1500)
    problems = []
    try:
        assert serves(gateway.port)
        os.kill(simulator.process.pid, signal.SIGSTOP)
        try:
            got = [ask(gateway.port) for _ in range(4)]
            problems += [f"{one}" for one in got if one[0] != 504]
            status, told = ask(gateway.port, method="GET", path="/health")
            if (status, told and told["status"]) != (200, "degraded"):
                problems.append(f"health with LM Studio frozen: {status} {told}")
        finally:
            os.kill(simulator.process.pid, signal.SIGCONT)
        again = healed(lambda: serves(gateway.port))
    finally:
        gateway.stop()
        simulator.stop()
    return Row("LM Studio frozen", f"{len(got)} requests, all answered 504", again, problems)


def redis_killed(folder: Path, simulator: Simulator) -> Row:
    """Redis, which holds the shared state, is killed and comes back empty."""
    binary, port = require("redis-server"), free_port()
    command = [binary, "--port", str(port), "--save", "", "--appendonly", "no"]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    redis = start()
    gateway = Gateway(folder, simulator.url, STATE_URL=f"redis://127.0.0.1:{port}/0")
    activate: dict[str, Any] = {"path": "/admin/models/activate", "body": {"modelKey": MODEL}}
    problems, workers = [], gateway.workers()
    try:
        eventually(lambda: ask(gateway.port, **activate)[0] == 200, 30)
        redis.kill()
        redis.wait(10)
        got = [ask(gateway.port)[0] for _ in range(20)]
        problems += [f"inference was answered {one}" for one in set(got) - {200}]
        began = time.monotonic()
        status, told = ask(gateway.port, **activate)
        if status not in (200, 503):
            problems.append(f"an activation was answered {status} {told}")
        if time.monotonic() - began > 30:
            problems.append("an activation waited for more than 30 s")
        if ask(gateway.port, method="GET", path="/health")[0] != 200:
            problems.append("no health")
        redis = start()
        again = healed(lambda: all(ask(gateway.port, **activate)[0] == 200 for _ in range(8)))
        if gateway.workers() != workers:
            problems.append("a worker was restarted")
        problems += tracebacks(gateway)
    finally:
        gateway.stop()
        redis.kill()
        redis.wait(10)
    return Row("Redis killed", f"no inference; activations got {status}", again, problems)
