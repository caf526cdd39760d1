"""The link to LM Studio's management API: lost, silent, shared by many, and recovered."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any

import pytest
import requests

from tests.processes import Gateway, Simulator, eventually, eventually_equal, free_port

SMALL = "qwen2-1.5b-instruct"
SLOW = "llama-3.3-70b-instruct"
UNREACHABLE = (
    "Failed to connect to LM Studio SDK after 3 attempts. "
    "Ensure LM Studio is running and the API server is enabled."
)
CHAT = {"model": SMALL, "messages": [{"role": "user", "content": "count to 3"}]}
Launch = Callable[..., Gateway]


class ClosingLMStudio:
    """An LM Studio that closes every connection at once and counts those for a WebSocket."""

    def __init__(self) -> None:
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    self.connections += b"websocket" in connection.recv(65536).lower()


@pytest.fixture
def simulators() -> Iterator[list[Simulator]]:
    """The list of a test's own simulators, which are stopped at its end."""
    started: list[Simulator] = []
    yield started
    for simulator in started:
        if simulator.process.poll() is None:
            simulator.stop()


def listing(gateway: Gateway) -> requests.Response:
    """Request the listing over a new connection, for use in threads."""
    with requests.Session() as http:
        http.trust_env = False
        return http.get(f"{gateway.url}/admin/models", timeout=60)


def statuses(gateway: Gateway, count: int) -> list[int]:
    """The statuses of ``count`` listings at the same time."""
    with ThreadPoolExecutor(count) as pool:
        responses = [pool.submit(listing, gateway) for _ in range(count)]
        return [response.result().status_code for response in responses]


def test_stopping_and_starting_lm_studio_needs_no_restart(
    launch: Launch, simulators: list[Simulator]
) -> None:
    port = free_port()
    simulators.append(Simulator(port))
    gateway = launch(simulators[-1].url, SDK_RETRY_DELAY=50)
    assert gateway.post("/admin/models/load", {"modelKey": SMALL}).status_code == 200
    for _ in range(2):
        simulators[-1].stop()
        for method, path, body in (
            ("GET", "/admin/models", None),
            ("POST", "/admin/models/load", {"modelKey": SMALL}),
            ("POST", "/admin/models/unload", {"modelKey": SMALL}),
        ):
            response = gateway.http.request(method, gateway.url + path, json=body, timeout=30)
            assert response.status_code == 503, (method, path)
            assert response.json()["error"] == UNREACHABLE
            assert response.headers["Retry-After"]
        assert gateway.get("/health").json()["status"] == "degraded"
        assert gateway.get("/health/ready").status_code == 503
        simulators.append(Simulator(port))
        assert gateway.post("/admin/models/load", {"modelKey": SMALL}).status_code == 200
        assert gateway.get("/health").json()["status"] == "ok"
        assert gateway.get("/health/ready").status_code == 200


def test_activating_needs_no_lm_studio(launch: Launch, simulators: list[Simulator]) -> None:
    simulators.append(Simulator())
    gateway = launch(simulators[-1].url, SDK_RETRY_DELAY=50)
    simulators[-1].stop()
    assert gateway.post("/admin/models/activate", {"modelKey": SMALL}).status_code == 200
    assert gateway.post("/admin/models/deactivate").status_code == 200


def test_the_number_of_attempts_is_a_setting(launch: Launch) -> None:
    gateway = launch(f"http://127.0.0.1:{free_port()}", SDK_MAX_ATTEMPTS=5, SDK_RETRY_DELAY=10)
    assert "after 5 attempts" in gateway.get("/admin/models").json()["error"]


def test_refused_websockets_are_503_while_inference_works(
    gateway: Gateway, simulator: Simulator
) -> None:
    simulator.faults(refuse_websockets=True, drop_sockets=True)
    # the default pause between attempts is 2 s
    response = gateway.get("/admin/models")
    assert (response.status_code, response.json()["error"]) == (503, UNREACHABLE)
    assert gateway.post("/v1/chat/completions", CHAT).status_code == 200
    simulator.faults(refuse_websockets=False)
    assert gateway.get("/admin/models").status_code == 200


def test_after_a_lost_connection_the_next_request_succeeds(
    gateway: Gateway, simulator: Simulator
) -> None:
    for _ in range(20):
        simulator.faults(drop_sockets=True)
        response = gateway.get("/admin/models")
        assert response.status_code == 200, response.text


def test_lost_connections_recover_under_concurrent_requests(
    gateway: Gateway, simulator: Simulator
) -> None:
    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            responses = [pool.submit(listing, gateway) for _ in range(8)]
            simulator.faults(drop_sockets=True)
            assert [response.result().status_code for response in responses] == [200] * 8


def test_a_load_that_loses_its_connection_fails_and_the_next_one_works(
    gateway: Gateway, simulator: Simulator
) -> None:
    simulator.faults(load_ms=60_000)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(gateway.post, "/admin/models/load", {"modelKey": SLOW})
        eventually(lambda: [one for one in simulator.state()["loads"] if one["progress"] > 0])
        simulator.faults(drop_sockets=True, load_ms=0)
        response = slow.result(30)
    assert response.status_code == 503
    assert response.json()["error"]
    assert gateway.post("/admin/models/load", {"modelKey": SMALL}).status_code == 200


def test_silence_after_the_upgrade_is_503_and_disturbs_nothing_else(
    launch: Launch, simulator: Simulator
) -> None:
    gateway = launch(WEB_CONCURRENCY=1, SDK_MAX_ATTEMPTS=2, SDK_RETRY_DELAY=10)
    simulator.faults(silent_after_upgrade=True)
    before = simulator.state()["sockets"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(listing, gateway)
        eventually(lambda: simulator.state()["sockets"] != before)
        assert gateway.get("/health").json()["status"] == "ok"
        assert gateway.post("/v1/chat/completions", CHAT).status_code == 200
        # it gives up after two attempts of 5 s; the other requests did not wait for that
        assert not waiting.done()
        assert waiting.result(60).status_code == 503
    eventually_equal(lambda: simulator.state()["sockets"], before)  # none is left behind
    simulator.faults(silent_after_upgrade=False)
    assert gateway.get("/admin/models").status_code == 200


def test_a_call_without_a_reply_is_504(gateway: Gateway, simulator: Simulator) -> None:
    assert gateway.get("/admin/models").status_code == 200
    simulator.faults(silent_rpc=True)
    response = gateway.get("/admin/models")
    assert response.status_code == 504
    assert response.json()["error"] == "LM Studio did not answer in time."
    simulator.faults(silent_rpc=False)
    assert gateway.get("/admin/models").status_code == 200


def test_health_does_not_wait_for_an_lm_studio_that_hangs(
    gateway: Gateway, simulator: Simulator
) -> None:
    simulator.faults(silent_http=True)
    for _ in range(3):
        health = gateway.get("/health", timeout=10).json()
        assert (health["status"], health["lmstudio"]["connected"]) == ("degraded", False)
        assert health["lmstudio"]["error"]


def test_ten_first_requests_share_one_connection_per_namespace(
    launch: Launch, simulator: Simulator
) -> None:
    gateway = launch(WEB_CONCURRENCY=1)
    simulator.reset()
    before = simulator.state()["socketsOpened"]
    assert statuses(gateway, 10) == [200] * 10
    opened = simulator.state()["socketsOpened"]
    new = {name: count - before.get(name, 0) for name, count in opened.items()}
    assert new == {"llm": 1, "embedding": 1, "system": 1}


def test_ten_requests_to_a_dead_lm_studio_share_the_attempts(launch: Launch) -> None:
    with closing(ClosingLMStudio()) as dead:
        # all ten requests arrive during the two pauses between the attempts
        gateway = launch(dead.url, WEB_CONCURRENCY=1, SDK_RETRY_DELAY=2000)
        assert statuses(gateway, 1) == [503]
        of_one = dead.connections
        assert of_one >= 3
        assert statuses(gateway, 10) == [503] * 10
        assert dead.connections == 2 * of_one


def test_inference_goes_on_while_a_large_model_loads(launch: Launch, simulator: Simulator) -> None:
    gateway = launch(WEB_CONCURRENCY=1)
    assert gateway.post("/v1/chat/completions", CHAT).status_code == 200

    def chat(number: int) -> int:
        body: dict[str, Any] = {**CHAT, "seed": number}
        return requests.post(
            f"{gateway.url}/v1/chat/completions", json=body, timeout=30
        ).status_code

    simulator.faults(load_ms=10_000)
    with ThreadPoolExecutor(9) as pool:
        load = pool.submit(gateway.post, "/admin/models/load", {"modelKey": SLOW})
        eventually(lambda: [one for one in simulator.state()["loads"] if one["progress"] > 0])
        assert list(pool.map(chat, range(50))) == [200] * 50
        assert not load.done()
        assert load.result(60).status_code == 200


def test_two_loads_run_at_the_same_time(launch: Launch, simulator: Simulator) -> None:
    gateway = launch(WEB_CONCURRENCY=1)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(gateway.post, "/admin/models/load", {"modelKey": SLOW})
        eventually(lambda: [one for one in simulator.state()["loads"] if one["progress"] > 0])
        body = {"modelKey": SMALL}
        quick = requests.post(f"{gateway.url}/admin/models/load", json=body, timeout=30)
        assert quick.status_code == 200
        assert not slow.done()
        assert slow.result(60).status_code == 200
