"""/debug/status and /debug/metrics cover all workers, and stay right after one is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import psutil
import pytest
import requests

from tests.conftest import EventReader
from tests.processes import Gateway, Simulator, eventually, eventually_equal

MODEL = "qwen2-1.5b-instruct"
BIG = "llama-3.3-70b-instruct"
CHAT = "/v1/chat/completions"
PERFORMANCE = (
    {"totalRequests", "totalErrors", "errorRate", "recentRequestCount", "completedRequestCount"}
    | {"avgResponseTimeMs", "minResponseTimeMs", "maxResponseTimeMs", "medianResponseTimeMs"}
    | {"p95ResponseTimeMs", "avgTtftMs", "avgTokensPerSec", "totalTokensProcessed"}
    | {"requestsWithTokenData", "tokenStats"}
)
SYSTEM = {"uptime", "uptimeFormatted", "memoryUsage", "pythonVersion", "platform", "workers"}
Launch = Callable[..., Gateway]
Listen = Callable[..., EventReader]


def chat(stream: bool = False, count: int = 2) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"count to {count}"}]
    return {"model": MODEL, "messages": messages, "stream": stream}


def ask(gateway: Gateway, path: str = CHAT, **headers: str) -> requests.Response:
    """Send a chat over a new connection, so that any worker may serve it."""
    return requests.post(gateway.url + path, json=chat(), headers=headers, timeout=30)


def fetch(gateway: Gateway, path: str = "/debug/status") -> Any:
    """Fetch JSON over a new connection, so that any worker may serve it."""
    return requests.get(gateway.url + path, timeout=30).json()


class Stream:
    """An endless chat over its own connection, which has received its first token."""

    def __init__(self, gateway: Gateway, request_id: str) -> None:
        self.request_id = request_id
        body = json.dumps(chat(stream=True, count=100_000)).encode()
        lines = [f"POST {CHAT} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        lines += [f"X-Request-Id: {request_id}", "X-Simulator-Pace-Ms: 100", "", ""]
        self.socket = socket.create_connection(("127.0.0.1", gateway.port), 30)
        self.port = self.socket.getsockname()[1]
        self.socket.sendall("\r\n".join(lines).encode() + body)
        while b'"content":"1 "' not in (piece := self.socket.recv(65536)):
            assert piece

    def close(self) -> None:
        self.socket.close()


@pytest.fixture(scope="module")
def shared(
    state_url: str, shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path_factory.mktemp("debug"), shared_simulator.url, STATE_URL=state_url)
    yield gateway
    gateway.stop()


@pytest.fixture
def observed(shared: Gateway, simulator: Simulator) -> Gateway:
    """The module's gateway with no active model and nothing in flight."""
    assert shared.post("/admin/models/deactivate").status_code == 200
    eventually(lambda: fetch(shared)["status"] == "idle", 20)
    return shared


@pytest.fixture
def streams() -> Iterator[Callable[..., list[Stream]]]:
    """Start endless streams, which end with the test."""
    with ExitStack() as stack:

        def start(gateway: Gateway, *request_ids: str) -> list[Stream]:
            return [stack.enter_context(closing(Stream(gateway, one))) for one in request_ids]

        yield start


def test_the_status_of_an_idle_gateway(observed: Gateway) -> None:
    status = fetch(observed)
    assert status.keys() == {"status", "currentOperation", "activeModel", "inFlight"} | {
        "recentRequests",
        "totalRequests",
        "totalErrors",
    }
    assert status["status"] == "idle"
    assert status["currentOperation"] is None
    assert status["activeModel"] is None
    assert status["inFlight"] == []


def test_every_worker_shows_what_is_in_flight_in_any_worker(
    observed: Gateway, streams: Callable[..., list[Stream]]
) -> None:
    names = {f"run-{number}" for number in range(12)}
    running = streams(observed, *names)
    for _ in range(10):
        eventually(lambda: {one["requestId"] for one in fetch(observed)["inFlight"]} == names, 20)
    status = fetch(observed)
    assert status["status"] == "processing_inference"
    assert status["currentOperation"]["requestId"] == running[0].request_id
    shown = status["inFlight"][0]
    assert (shown["method"], shown["path"], shown["model"]) == ("POST", CHAT, MODEL)
    assert shown["elapsedMs"] >= 0
    for one in running:
        one.close()
    eventually(lambda: fetch(observed)["status"] == "idle", 20)
    assert fetch(observed)["inFlight"] == []


def test_a_stream_in_flight_shows_its_progress(
    observed: Gateway, streams: Callable[..., list[Stream]]
) -> None:
    first, _ = streams(observed, "older", "younger")

    def chunks() -> list[int]:
        return [one.get("chunks", 0) for one in fetch(observed)["inFlight"]]

    eventually(lambda: len(chunks()) == 2 and min(chunks()) > 0, 20)
    before = chunks()
    eventually(lambda: chunks()[0] > before[0], 20)
    assert [one["requestId"] for one in fetch(observed)["inFlight"]] == ["older", "younger"]
    first.close()
    eventually(lambda: len(chunks()) == 1, 20)


def test_two_exchanges_with_the_same_request_id_are_kept_apart(
    observed: Gateway, streams: Callable[..., list[Stream]]
) -> None:
    first, _ = streams(observed, "same", "same")
    eventually(lambda: len(fetch(observed)["inFlight"]) == 2, 20)
    before = len([e for e in fetch(observed)["recentRequests"] if e["requestId"] == "same"])
    first.close()
    eventually(
        lambda: [e["requestId"] for e in fetch(observed)["recentRequests"]].count("same") > before,
        20,
    )
    assert len(fetch(observed)["inFlight"]) == 1
    assert fetch(observed)["status"] == "processing_inference"


def test_a_load_is_shown_while_it_is_in_flight(observed: Gateway, simulator: Simulator) -> None:
    simulator.faults(load_ms=60_000)
    body = json.dumps({"modelKey": BIG}).encode()
    lines = ["POST /admin/models/load HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += ["Content-Type: application/json", "", ""]
    with socket.create_connection(("127.0.0.1", observed.port), 30) as client:
        client.sendall("\r\n".join(lines).encode() + body)
        eventually(lambda: fetch(observed)["status"] == "loading_model", 20)
        status = eventually(lambda: (now := fetch(observed))["currentOperation"] and now, 20)
        assert status["currentOperation"]["modelKey"] == BIG
        assert [one["operation"] for one in status["inFlight"]] == ["model_load"]
    # the client has disconnected, so the load is cancelled
    eventually(lambda: fetch(observed)["status"] == "idle", 20)


def test_recent_requests_are_the_last_ten_newest_first(observed: Gateway) -> None:
    names = [f"recent-{number}" for number in range(12)]
    for name in names:
        ask(observed, **{"X-Request-Id": name})
        eventually(lambda n=name: fetch(observed)["recentRequests"][0]["requestId"] == n, 20)
    recent = [one["requestId"] for one in fetch(observed)["recentRequests"]]
    assert recent == names[:1:-1]


def test_only_inference_exchanges_are_counted(observed: Gateway) -> None:
    before = fetch(observed)

    def counted() -> tuple[int, ...]:
        """How many requests and errors have been counted since."""
        now = fetch(observed)
        return tuple(now[name] - before[name] for name in ("totalRequests", "totalErrors"))

    for path in ("/health", "/admin/models", "/api/v0/models", "/debug/metrics", "/metrics", "/no"):
        assert requests.get(observed.url + path, timeout=30).status_code in (200, 404)
    assert counted() == (0, 0)
    assert ask(observed).status_code == 200
    assert ask(observed, "/chat/completions").status_code == 200
    assert requests.get(observed.url + "/models", timeout=30).status_code == 200
    assert ask(observed, **{"X-Simulator-Fault": "refuse-500"}).status_code == 500
    assert ask(observed, "/v1/nothing").status_code == 404
    eventually_equal(counted, (5, 2))


def test_metrics_has_the_members_of_the_contract(observed: Gateway) -> None:
    ask(observed)
    eventually(lambda: fetch(observed, "/debug/metrics")["recentActivity"]["last10Requests"], 20)
    # the end of an exchange is published just after its response
    eventually(lambda: fetch(observed, "/debug/metrics")["currentOperation"] is None, 20)
    metrics = fetch(observed, "/debug/metrics")
    assert metrics.keys() == {"modelInfo", "performance", "recentActivity", "system"} | {
        "currentOperation"
    }
    performance = metrics["performance"]
    assert performance.keys() == PERFORMANCE
    least, most = performance["minResponseTimeMs"], performance["maxResponseTimeMs"]
    assert 0 < least <= performance["medianResponseTimeMs"] <= performance["p95ResponseTimeMs"]
    assert least <= performance["avgResponseTimeMs"] <= most
    assert metrics["system"].keys() == SYSTEM
    assert metrics["system"]["memoryUsage"]["rss"] > 1e6
    assert metrics["system"]["workers"] == 2
    assert metrics["currentOperation"] is None
    assert metrics["modelInfo"] is None
    recent = metrics["recentActivity"]["last10Requests"]
    assert 0 < len(recent) <= 10


def test_a_killed_worker_loses_only_its_own_exchanges_and_they_are_reported(
    launch: Launch, listen: Listen, state_url: str, streams: Callable[..., list[Stream]]
) -> None:
    gateway = launch(STATE_URL=state_url)
    reader = listen(gateway)
    before = fetch(gateway)
    running: list[Stream] = []

    def streams_of(pid: int) -> set[str]:
        ports = client_ports(pid, gateway.port)
        return {one.request_id for one in running if one.port in ports}

    def start_more() -> int | None:
        """Start streams. Returns a worker that has some of them but not the reader, if any."""
        running.extend(streams(gateway, *(f"kill-{len(running) + n}" for n in range(6))))
        others = (p for p in gateway.workers() if reader.port not in client_ports(p, gateway.port))
        return next(filter(streams_of, others), None)

    # the kernel decides which worker accepts a connection
    victim: int = eventually(start_more)
    names = [one.request_id for one in running]
    for name in names:
        reader.until("inference_start", requestId=name)
    lost = streams_of(victim)
    os.kill(victim, signal.SIGKILL)
    for name in lost:
        error = reader.until("error", requestId=name)
        assert error["operation"] == "inference"
        assert reader.until("inference_complete", requestId=name)["cancelled"] is False
    for one in running:
        one.close()
    eventually(lambda: fetch(gateway)["status"] == "idle", 30)
    for name in names:
        reader.until("inference_complete", requestId=name)
        assert len(reader.of("inference_complete", requestId=name)) == 1
    eventually(lambda: len(gateway.workers()) == 2, 20)
    for _ in range(8):
        assert ask(gateway).status_code == 200
    eventually_equal(lambda: fetch(gateway)["status"], "idle")
    expected = (before["totalRequests"] + len(names) + 8, before["totalErrors"] + len(lost))
    for read in (
        lambda: fetch(gateway),
        lambda: fetch(gateway, "/debug/metrics")["performance"],
    ):
        eventually_equal(lambda r=read: (r()["totalRequests"], r()["totalErrors"]), expected)


def client_ports(pid: int, port: int) -> set[int]:
    """The client ports of a worker's connections."""
    found = psutil.Process(pid).net_connections("tcp")
    return {one.raddr.port for one in found if one.raddr and one.laddr.port == port}
