"""A new active model applies to every worker as soon as it is activated, and survives restarts."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from tests.processes import Gateway, Simulator

QWEN = "qwen2.5-7b-instruct"
SMALL = "qwen2-1.5b-instruct"
EMBEDDING = "text-embedding-nomic-embed-text-v1.5"
MESSAGES = [{"role": "user", "content": "count to 2"}]
Launch = Callable[..., Gateway]


def activate(gateway: Gateway, key: str, **body: Any) -> None:
    response = gateway.post("/admin/models/activate", {"modelKey": key, **body})
    assert response.status_code == 200, response.text


def chat(gateway: Gateway, count: int) -> list[int]:
    """Send chats without a model over new connections, so that both workers serve some."""

    def one(_: int) -> int:
        body = {"messages": MESSAGES}
        return requests.post(
            f"{gateway.url}/v1/chat/completions", json=body, timeout=30
        ).status_code

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(count)))


def models_sent(simulator: Simulator, since: int = 0) -> list[str]:
    """The models of the chats that reached LM Studio."""
    return [
        json.loads(entry["body"]).get("model")
        for entry in simulator.requests(since)
        if entry["target"] == "/v1/chat/completions"
    ]


def test_every_request_after_an_activation_uses_it(gateway: Gateway, simulator: Simulator) -> None:
    assert len(gateway.workers()) == 2
    activate(gateway, QWEN, defaultInference={"temperature": 0.25})
    assert chat(gateway, 200) == [200] * 200
    assert models_sent(simulator) == [QWEN] * 200
    bodies = [json.loads(one["body"]) for one in simulator.requests() if one["body"]]
    assert {body["temperature"] for body in bodies} == {0.25}


def test_alternating_activations_never_get_mixed_up(gateway: Gateway, simulator: Simulator) -> None:
    for number in range(20):
        key = (QWEN, SMALL)[number % 2]
        since = max((one["id"] for one in simulator.requests()), default=0)
        activate(gateway, key)
        assert chat(gateway, 8) == [200] * 8
        assert models_sent(simulator, since) == [key] * 8


def test_every_worker_sees_a_deactivation_at_once(gateway: Gateway) -> None:
    for _ in range(10):
        activate(gateway, SMALL)
        assert gateway.post("/admin/models/deactivate").status_code == 200
        assert chat(gateway, 8) == [400] * 8


def test_every_worker_sees_a_load_at_once(gateway: Gateway, simulator: Simulator) -> None:
    body = {"modelKey": SMALL, "instanceId": "mine"}
    assert gateway.post("/admin/models/load", body).status_code == 200
    assert chat(gateway, 20) == [200] * 20
    assert models_sent(simulator) == ["mine"] * 20


def test_values_of_the_client_are_never_replaced(gateway: Gateway, simulator: Simulator) -> None:
    activate(gateway, QWEN, defaultInference={"temperature": 0.25})
    body = {"model": SMALL, "messages": MESSAGES, "temperature": 1}
    assert gateway.post("/v1/chat/completions", body).status_code == 200
    assert json.loads(simulator.last_request()["body"]) == body


def test_embeddings_get_the_active_model_only_if_it_is_an_embedding_model(
    gateway: Gateway, simulator: Simulator
) -> None:
    activate(gateway, SMALL)
    response = gateway.post("/v1/embeddings", {"input": "x"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_active_model"
    activate(gateway, EMBEDDING)
    assert gateway.post("/v1/embeddings", {"input": "x"}).status_code == 200
    assert json.loads(simulator.last_request()["body"])["model"] == EMBEDDING


def test_odd_names_of_the_active_model_reach_lm_studio(
    gateway: Gateway, simulator: Simulator
) -> None:
    for odd in ('a"b\\c', "ü€😀"):
        activate(gateway, odd)
        response = gateway.post("/v1/chat/completions", {"messages": MESSAGES})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["code"] == "model_not_found"
        assert json.loads(simulator.last_request()["body"])["model"] == odd


def test_the_active_model_survives_a_restart(launch: Launch, simulator: Simulator) -> None:
    gateway = launch()
    defaults = {"temperature": 0.5, "stopStrings": ["ü"]}
    activate(gateway, SMALL, defaultInference=defaults)
    gateway.stop()
    gateway.start()
    active = gateway.get("/admin/models").json()["active"]
    assert (active["modelKey"], active["defaultInference"]) == (SMALL, defaults)
    assert chat(gateway, 4) == [200] * 4
    assert models_sent(simulator) == [SMALL] * 4


def test_two_gateways_that_share_a_state_agree(launch: Launch, simulator: Simulator) -> None:
    first = launch(WEB_CONCURRENCY=1)
    second = launch(WEB_CONCURRENCY=1, STATE_URL=first.environ["STATE_URL"])
    for key in (QWEN, SMALL, QWEN):
        activate(first, key)
        assert second.get("/admin/models").json()["active"]["modelKey"] == key
    second.post("/admin/models/deactivate")
    assert first.get("/admin/models").json()["active"] is None


def test_lm_studio_lists_models_that_the_gateway_loaded(gateway: Gateway) -> None:
    body = {"modelKey": SMALL, "instanceId": "mine", "loadConfig": {"contextLength": 2048}}
    assert gateway.post("/admin/models/load", body).status_code == 200
    native = gateway.get("/api/v0/models").json()["data"]
    states = {model["id"]: model["state"] for model in native}
    assert "loaded" in states.values()
    assert {model["id"] for model in gateway.get("/v1/models").json()["data"]}
