"""Faults of the gateway's dependencies, LM Studio and Redis. Each returns a :class:`Row`."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.faults.harness import MODEL, Row, ask, recovery, serves, start_streams, tracebacks
from tests.nginx import require
from tests.processes import Gateway, Simulator, eventually, free_port

#: The statuses of the contract for requests during an outage of LM Studio.
_OUTAGE = {502, 503, 504}


def _crash(simulator: Simulator) -> None:
    simulator.process.kill()
    simulator.process.wait(10)
    assert simulator.process.stdout is not None
    simulator.process.stdout.close()
    simulator.http.close()


def _crash_while(
    folder: Path, fault: str, run: Callable[[Gateway, Simulator], tuple[str, list[str]]]
) -> Row:
    """Call ``run``, which kills LM Studio, and restart LM Studio on the same port.

    ``run`` returns what was lost, and the problems.
    """
    simulator = Simulator(0, "--pace-ms", "20")
    gateway = Gateway(folder, simulator.url)
    workers = gateway.workers()
    try:
        assert serves(gateway.port)
        lost, problems = run(gateway, simulator)
        status, body = ask(gateway.port)
        if (status, body and body["error"]["code"]) != (503, "lmstudio_unreachable"):
            problems.append(f"without LM Studio: {status} {body}")
        problems += _health_problems(gateway)
        simulator = Simulator(simulator.port, "--pace-ms", "20")
        listing = {"method": "GET", "path": "/admin/models"}
        recovered = recovery(
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
    return Row(f"LM Studio killed {fault}", lost, recovered, problems)


def killed_during_streams(folder: Path, count: int = 12) -> Row:
    def run(gateway: Gateway, simulator: Simulator) -> tuple[str, list[str]]:
        running = start_streams(gateway.port, count, count=2000)
        _crash(simulator)
        for one in running:
            one.join()
        problems = [repr(one.text[-200:]) for one in running if not one.ended_with_error]
        return f"{count} streams, {count - len(problems)} with an error event", problems

    return _crash_while(folder, "during streams", run)


def killed_while_requests_wait(folder: Path, count: int = 12) -> Row:
    def run(gateway: Gateway, simulator: Simulator) -> tuple[str, list[str]]:
        headers = {"X-Simulator-Prefill-Ms": "60000"}
        simulator.reset()
        with ThreadPoolExecutor(count) as pool:
            requests = [pool.submit(ask, gateway.port, headers=headers) for _ in range(count)]
            eventually(lambda: len(simulator.requests()) == count)
            _crash(simulator)
            responses = [one.result(60) for one in requests]
        problems = [f"{status} {body}" for status, body in responses if status != 502]
        return f"{count} requests, {count - len(problems)} of them got 502", problems

    return _crash_while(folder, "while requests wait", run)


def killed_during_load(folder: Path) -> Row:
    def run(gateway: Gateway, simulator: Simulator) -> tuple[str, list[str]]:
        body = {"modelKey": "qwen2.5-7b-instruct", "instanceId": "doomed"}
        load: dict[str, Any] = {"path": "/admin/models/load", "body": body}
        simulator.faults(load_ms=60_000)
        with ThreadPoolExecutor(1) as pool:
            request = pool.submit(ask, gateway.port, **load)
            eventually(lambda: any(one["progress"] > 0 for one in simulator.state()["loads"]))
            _crash(simulator)
            status, body = request.result(60)
        problems = []
        if status not in _OUTAGE:
            problems.append(f"the load got {status} {body}")
        return f"the load, which got {status}", problems

    return _crash_while(folder, "during a load", run)


def frozen(folder: Path) -> Row:
    """LM Studio is stopped (SIGSTOP): it accepts connections and never responds."""
    simulator = Simulator(0, "--pace-ms", "1")
    gateway = Gateway(folder, simulator.url, PROXY_TIMEOUT=5000)
    problems = []
    try:
        assert serves(gateway.port)
        os.kill(simulator.process.pid, signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(4) as pool:
                responses = list(pool.map(lambda _: ask(gateway.port), range(4)))
            problems += [f"{one}" for one in responses if one[0] != 504]
            problems += _health_problems(gateway)
        finally:
            os.kill(simulator.process.pid, signal.SIGCONT)
        recovered = recovery(lambda: serves(gateway.port))
    finally:
        gateway.stop()
        simulator.stop()
    lost = f"{len(responses)} requests, all of them got 504"
    return Row("LM Studio frozen", lost, recovered, problems)


def redis_killed(folder: Path, simulator: Simulator) -> Row:
    """Redis, which holds the shared state, is killed and restarted empty."""
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
        statuses = {ask(gateway.port)[0] for _ in range(20)}
        problems += [f"an inference request got {status}" for status in statuses - {200}]
        # the status is 0 if no response arrives within 30 s
        status, body = ask(gateway.port, 30, **activate)
        if status not in (200, 503):
            problems.append(f"an activation got {status} {body}")
        if ask(gateway.port, method="GET", path="/health")[0] != 200:
            problems.append("/health failed")
        redis = start()
        recovered = recovery(lambda: all(ask(gateway.port, **activate)[0] == 200 for _ in range(8)))
        if gateway.workers() != workers:
            problems.append("a worker was restarted")
        problems += tracebacks(gateway)
    finally:
        gateway.stop()
        redis.kill()
        redis.wait(10)
    return Row("Redis killed", f"no inference; activations got {status}", recovered, problems)


def _health_problems(gateway: Gateway) -> list[str]:
    """Without LM Studio, /health must say ``degraded``."""
    status, body = ask(gateway.port, method="GET", path="/health")
    if (status, body and body["status"]) == (200, "degraded"):
        return []
    return [f"health without LM Studio: {status} {body}"]
