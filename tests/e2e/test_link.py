"""The connection to LM Studio's management side: lost, silent, crowded, and well again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.processes import Gateway, Simulator, eventually, free_port

SMALL = "qwen2-1.5b-instruct"
SLOW = "llama-3.3-70b-instruct"
UNREACHABLE = (
    "Failed to connect to LM Studio SDK after 3 attempts. "
    "Ensure LM Studio is running and the API server is enabled."
)
CHAT = {"model": SMALL, "messages": [{"role": "user", "content": "count to 3"}]}
Launch = Callable[..., Gateway]


@pytest.fixture
def fleeting() -> Iterator[list[Simulator]]:
    """Simulators of a test's own; those that still run at its end are stopped."""
    started: list[Simulator] = []
    yield started
    for simulator in started:
        if simulator.process.poll() is None:
            simulator.stop()


def listing(gateway: Gateway) -> requests.Response:
    """The listing over a connection of its own, for use in threads."""
    with requests.Session() as http:
        http.trust_env = False
        return http.get(f"{gateway.url}/admin/models", timeout=60)


def statuses(gateway: Gateway, count: int) -> list[int]:
    """The statuses of so many listings at once."""
    with ThreadPoolExecutor(count) as pool:
        answers = [pool.submit(listing, gateway) for _ in range(count)]
        return [answer.result().status_code for answer in answers]


def test_lm_studio_going_and_coming_back_needs_no_restart(
    launch: Launch, fleeting: list[Simulator]
) -> None:
    port = free_port()
    fleeting.append(Simulator(port))
    gateway = launch(fleeting[-1].url, SDK_RETRY_DELAY=50)
    assert gateway.post("/admin/models/load", {"modelKey": SMALL}).status_code == 200
    for _ in range(2):
        fleeting[-1].stop()
        for method, path, body in (
            ("GET", "/admin/models", None),
            ("POST", "/admin/models/load", {"modelKey": SMALL}),
            ("POST", "/admin/models/unload", {"modelKey": SMALL}),
        ):
            answer = gateway.http.request(method, gateway.url + path, json=body, timeout=30)
            assert answer.status_code == 503, (method, path)
            assert answer.json()["error"] == UNREACHABLE
            assert answer.headers["Retry-After"]
        assert gateway.get("/health").json()["status"] == "degraded"
        assert gateway.get("/health/ready").status_code == 503
        fleeting.append(Simulator(port))
        assert gateway.post("/admin/models/load", {"modelKey": SMALL}).status_code == 200
        assert gateway.get("/health").json()["status"] == "ok"
        assert gateway.get("/health/ready").status_code == 200


def test_activating_needs_no_lm_studio(launch: Launch, fleeting: list[Simulator]) -> None:
    fleeting.append(Simulator())
    gateway = launch(fleeting[-1].url, SDK_RETRY_DELAY=50)
    fleeting[-1].stop()
    assert gateway.post("/admin/models/activate", {"modelKey": SMALL}).status_code == 200
    assert gateway.post("/admin/models/deactivate").status_code == 200


def test_the_attempts_are_those_of_the_settings(launch: Launch) -> None:
    gateway = launch(f"http://127.0.0.1:{free_port()}", SDK_MAX_ATTEMPTS=5, SDK_RETRY_DELAY=10)
    assert "after 5 attempts" in gateway.get("/admin/models").json()["error"]


def test_refused_websockets_are_503_while_inference_works(
    gateway: Gateway, simulator: Simulator
) -> None:
    simulator.faults(refuse_websockets=True, drop_sockets=True)
    # the default pause between attempts is 2 s
    answer = gateway.get("/admin/models")
    assert (answer.status_code, answer.json()["error"]) == (503, UNREACHABLE)
    assert gateway.post("/v1/chat/completions", CHAT).status_code == 200
    simulator.faults(refuse_websockets=False)
    assert gateway.get("/admin/models").status_code == 200


def test_a_dropped_socket_heals_without_anybody_noticing(
    gateway: Gateway, simulator: Simulator
) -> None:
    for _ in range(20):
        simulator.faults(drop_sockets=True)
        answer = gateway.get("/admin/models")
        assert answer.status_code == 200, answer.text


def test_dropped_sockets_heal_under_concurrent_readers(
    gateway: Gateway, simulator: Simulator
) -> None:
    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(listing, gateway) for _ in range(8)]
            simulator.faults(drop_sockets=True)
            assert [answer.result().status_code for answer in answers] == [200] * 8


def test_a_load_whose_socket_drops_fails_and_the_next_one_works(
    gateway: Gateway, simulator: Simulator
) -> None:
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(gateway.post, "/admin/models/load", {"modelKey": SLOW})
        eventually(lambda: [one for one in simulator.state()["loads"] if one["progress"] > 0])
        simulator.faults(drop_sockets=True)
        answer = slow.result(20)
    assert answer.status_code == 503
    assert answer.json()["error"]
    assert gateway.post("/admin/models/load", {"modelKey": SMALL}).status_code == 200


def test_silence_after_the_upgrade_is_503_within_its_deadline(
    launch: Launch, simulator: Simulator
) -> None:
    gateway = launch(WEB_CONCURRENCY=1, SDK_MAX_ATTEMPTS=2, SDK_RETRY_DELAY=10)
    simulator.faults(silent_after_upgrade=True)
    before = simulator.state()["sockets"]
    with ThreadPoolExecutor(1) as pool:
        begun = time.monotonic()
        waiting = pool.submit(listing, gateway)
        eventually(lambda: simulator.state()["sockets"] != before)
        asked = time.monotonic()
        assert gateway.get("/health").json()["status"] == "ok"
        assert time.monotonic() - asked < 1
        assert gateway.post("/v1/chat/completions", CHAT).status_code == 200
        assert not waiting.done()
        assert waiting.result(30).status_code == 503
        assert time.monotonic() - begun < 15  # two attempts of 5 s
    eventually(lambda: simulator.state()["sockets"] == before, 5)  # none is left behind
    simulator.faults(silent_after_upgrade=False)
    assert gateway.get("/admin/models").status_code == 200


def test_a_call_that_is_never_answered_is_504(gateway: Gateway, simulator: Simulator) -> None:
    assert gateway.get("/admin/models").status_code == 200
    simulator.faults(silent_rpc=True)
    begun = time.monotonic()
    answer = gateway.get("/admin/models")
    assert answer.status_code == 504
    assert answer.json()["error"] == "LM Studio did not answer in time."
    assert time.monotonic() - begun < 15
    simulator.faults(silent_rpc=False)
    assert gateway.get("/admin/models").status_code == 200


def test_health_answers_at_once_when_lm_studio_hangs(
    gateway: Gateway, simulator: Simulator
) -> None:
    simulator.faults(silent_http=True)
    for _ in range(3):
        begun = time.monotonic()
        told = gateway.get("/health").json()
        assert time.monotonic() - begun < 1
        assert (told["status"], told["lmstudio"]["connected"]) == ("degraded", False)
        assert told["lmstudio"]["error"]


def test_ten_first_users_share_one_socket_per_namespace(
    launch: Launch, simulator: Simulator
) -> None:
    gateway = launch(WEB_CONCURRENCY=1)
    simulator.reset()
    before = simulator.state()["socketsOpened"]
    assert statuses(gateway, 10) == [200] * 10
    opened = simulator.state()["socketsOpened"]
    new = {name: count - before.get(name, 0) for name, count in opened.items()}
    assert new == {"llm": 1, "embedding": 1, "system": 1}


def test_ten_users_of_a_dead_lm_studio_share_the_attempts(launch: Launch) -> None:
    gateway = launch(f"http://127.0.0.1:{free_port()}", WEB_CONCURRENCY=1, SDK_RETRY_DELAY=500)
    begun = time.monotonic()
    assert statuses(gateway, 10) == [503] * 10
    assert time.monotonic() - begun < 5


def test_inference_goes_on_while_a_large_model_loads(launch: Launch, simulator: Simulator) -> None:
    gateway = launch(WEB_CONCURRENCY=1)
    assert gateway.post("/v1/chat/completions", CHAT).status_code == 200

    def chat(number: int) -> int:
        body: dict[str, Any] = {**CHAT, "seed": number}
        return requests.post(
            f"{gateway.url}/v1/chat/completions", json=body, timeout=30
        ).status_code

    with ThreadPoolExecutor(9) as pool:
        load = pool.submit(gateway.post, "/admin/models/load", {"modelKey": SLOW})
        eventually(lambda: [one for one in simulator.state()["loads"] if one["progress"] > 0])
        assert list(pool.map(chat, range(50))) == [200] * 50
        assert not load.done()
        assert load.result(30).status_code == 200


def test_two_loads_run_side_by_side(launch: Launch, simulator: Simulator) -> None:
    gateway = launch(WEB_CONCURRENCY=1)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(gateway.post, "/admin/models/load", {"modelKey": SLOW})
        eventually(lambda: [one for one in simulator.state()["loads"] if one["progress"] > 0])
        body = {"modelKey": SMALL}
        quick = requests.post(f"{gateway.url}/admin/models/load", json=body, timeout=30)
        assert quick.status_code == 200
        assert not slow.done()
        assert slow.result(30).status_code == 200
