"""Runs mixed traffic with aborts for some minutes: nothing may fail, and nothing may leak.

``python -m tests.soak.soak --minutes 10``; exits 1 on a failure or a leak.
"""

from gevent import monkey

monkey.patch_all()

import argparse  # noqa: E402
import random  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402

from tests.processes import (  # noqa: E402
    Gateway,
    Simulator,
    default_signals_for_children,
    eventually,
    eventually_equal,
)
from tests.raw_http import counted, exchange, request, unchunked  # noqa: E402
from tests.soak.traffic import (  # noqa: E402
    CHAT,
    EMBEDDING,
    MODEL,
    allow_many_files,
    chat,
    descriptors,
    memory,
)

CLIENTS = 30
INTERVAL = 5.0
#: Memory that grows by more than this share, and some MiB on top, is a leak.
GROWTH, SLACK = 0.05, 6.0


class Failure(Exception):
    """A response is not the expected one."""


@dataclass
class Sample:
    """The resources of all processes of the gateway at one moment."""

    at: float
    rss: float
    pss: float
    fds: list[int]
    sockets: list[int]

    def __str__(self) -> str:
        memory = f"RSS {self.rss:6.1f} MiB, PSS {self.pss:6.1f} MiB"
        return f"{self.at:5.0f} s: {memory}, fds {self.fds}, sockets {self.sockets}"


def expect(condition: bool, response: bytes) -> None:
    if not condition:
        raise Failure(response[:300] + b" ... " + response[-200:])


def simple(method: str, path: str, content: Any, status: int, text: bytes, **simulate: Any) -> Any:
    """Return a client that expects a status and some text in the response."""
    data = request(method, path, content, {k.replace("_", "-"): v for k, v in simulate.items()})

    def run(port: int) -> None:
        response = exchange(port, data)
        expect(response.startswith(b"HTTP/1.1 %d " % status) and text in response, response)

    return run


def stream(port: int) -> None:
    count = random.randint(1, 80)
    data = request("POST", CHAT, chat(count, True), {"Pace-Ms": random.choice([1, 5, 20])})
    response = exchange(port, data)
    expect(counted(response) == list(range(1, count + 1)), response)
    expect(response.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), response)
    expect(b'"usage":{' not in response, response)


def broken_stream(port: int) -> None:
    response = exchange(port, request("POST", CHAT, chat(9, True), {"Fault": "break-stream"}))
    expect(b'data: {"error":' in unchunked(response) and b"[DONE]" not in response, response)
    expect(not response.endswith(b"0\r\n\r\n"), response)


def disconnect(streams: bool, **simulate: Any) -> Callable[[int], None]:
    """Return a client that disconnects while it streams or waits."""
    knobs = {name.replace("_", "-"): value for name, value in simulate.items()}
    data = request("POST", CHAT, chat(5000, streams), knobs)

    def run(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), 60) as client:
            client.sendall(data)
            if "Prefill-Ms" not in knobs:
                client.recv(65536)
            gevent.sleep(random.random() * 0.4)
            if random.random() < 0.3:
                client.shutdown(socket.SHUT_WR)
                gevent.sleep(0.1)

    return run


MIX: dict[str, tuple[int, Callable[[int], None]]] = {
    "plain": (20, simple("POST", CHAT, chat(5, False), 200, b"1 2 3 4 5 ")),
    "stream": (30, stream),
    "abort a stream": (10, disconnect(True, Pace_Ms=20)),
    "abort prompt processing": (6, disconnect(True, Prefill_Ms=60000)),
    "abort a plain response": (6, disconnect(False, Prefill_Ms=60000)),
    "embeddings": (
        8,
        simple("POST", "/v1/embeddings", {"model": EMBEDDING, "input": ["a", "b"]}, 200, b"index"),
    ),
    "large": (1, simple("POST", CHAT, chat(1, False), 200, b"word word", Fault="big-answer")),
    "upload": (2, simple("POST", "/v1/audio/transcriptions", b"x" * 300_000, 404, b"Unexpected")),
    "unknown model": (3, simple("POST", CHAT, {"model": "x", "messages": []}, 400, b"Invalid")),
    "invalid JSON": (2, simple("POST", CHAT, b"{", 400, b"invalid_json")),
    "error in a 200": (3, simple("POST", CHAT, chat(1, False), 400, b"crashed", Fault="error-200")),
    "error page": (2, simple("POST", CHAT, chat(1, False), 500, b"Internal", Fault="refuse-500")),
    "no response": (
        2,
        simple("POST", CHAT, chat(1, 0), 502, b"bad_gat", Fault="close-before-head"),
    ),
    "broken stream": (4, broken_stream),
    "models": (5, simple("GET", "/v1/models", None, 200, MODEL.encode())),
    "admin list": (2, simple("GET", "/admin/models", None, 200, b'"downloaded"')),
    "health": (1, simple("GET", "/health", None, 200, b'"ok"')),
}


class Soak:
    """Clients that send one request after another, and samples of the gateway's resources."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.began = time.monotonic()
        self.done: Counter[str] = Counter()
        self.failures: list[str] = []
        self.samples: list[Sample] = []

    def client(self, until: float) -> None:
        names, weights = list(MIX), [weight for weight, _ in MIX.values()]
        while time.monotonic() < until:
            (name,) = random.choices(names, weights)
            try:
                MIX[name][1](self.gateway.port)
            except (OSError, Failure, ValueError) as error:
                at = time.monotonic() - self.began
                self.failures.append(f"{at:.0f} s, {name}: {error!r}")
            self.done[name] += 1
            gevent.sleep(random.random() * 0.1)

    def sample(self) -> Sample:
        now = time.monotonic() - self.began
        return Sample(now, *memory(self.gateway), *descriptors(self.gateway))

    def run(self, seconds: float) -> None:
        until = self.began + seconds
        clients = [gevent.spawn(self.client, until) for _ in range(CLIENTS)]
        while time.monotonic() < until - INTERVAL / 2:
            gevent.sleep(INTERVAL)
            self.samples.append(self.sample())
            print(self.samples[-1], flush=True)
        gevent.joinall(clients)

    def leaks(self, seconds: float) -> list[str]:
        """Describe what grew from the first minute to the last (the first third of a short run)."""
        span = min(60.0, seconds / 3)
        first = [one for one in self.samples if one.at <= span + 1]
        last = [one for one in self.samples if one.at >= self.samples[-1].at - span + 1]
        found = []
        for name, value, slack in (
            ("RSS in MiB", lambda one: one.rss, SLACK),
            ("PSS in MiB", lambda one: one.pss, SLACK),
            ("fds", lambda one: sum(one.fds), 40.0),
            ("sockets", lambda one: sum(one.sockets), 40.0),
        ):
            begin, end = (sum(map(value, part)) / len(part) for part in (first, last))
            print(f"{name}: first {span:.0f} s {begin:.1f}, last {span:.0f} s {end:.1f}")
            if end > begin * (1 + GROWTH) + slack:
                found.append(f"{name} grew from {begin:.1f} to {end:.1f}")
        return found


def main() -> int:
    default_signals_for_children()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    seconds = parser.parse_args().minutes * 60
    allow_many_files()
    simulator = Simulator(0, "--pace-ms", "2")
    with tempfile.TemporaryDirectory() as folder:
        gateway = Gateway(Path(folder), simulator.url, WEB_CONCURRENCY=2)
        try:
            soak = Soak(gateway)
            soak.run(seconds)
            problems = soak.leaks(seconds)
            print("after all clients have disconnected:", soak.sample())
            # an idle connection may stay open until the next request, but no longer
            try:
                eventually(lambda: _quiet(soak))
            except AssertionError:
                problems.append(f"sockets left open: {soak.sample()}")
            try:
                eventually_equal(lambda: _running(simulator), [])
            except AssertionError:
                problems.append(f"still running in LM Studio: {_running(simulator)}")
            print("at rest:", soak.sample())
        finally:
            gateway.stop()
            simulator.stop()
    print("done:", dict(soak.done.most_common()), "in all", soak.done.total())
    print(f"{len(soak.failures)} failures, {len(problems)} leaks")
    for line in soak.failures[:20] + problems:
        print(f"  {line}")
    return 1 if soak.failures or problems else 0


def _running(simulator: Simulator) -> list[str]:
    return [one["target"] for one in simulator.requests() if one["outcome"] == "running"]


def _quiet(soak: Soak) -> bool:
    """Whether each worker holds at most the SDK's WebSockets and one idle connection."""
    gevent.sleep(5)  # idle connections become stale
    for _ in range(20):  # both workers get a request and close the stale ones
        MIX["models"][1](soak.gateway.port)
    return max(descriptors(soak.gateway)[1]) <= 6


if __name__ == "__main__":
    sys.exit(main())
