"""Activating, deactivating and unloading over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from tests.processes import Gateway, Simulator

QWEN = "qwen2.5-7b-instruct"
SMALL = "qwen2-1.5b-instruct"
EMBEDDING = "text-embedding-nomic-embed-text-v1.5"
DEFAULTS = {"temperature": 0.7, "maxTokens": 256, "stopStrings": ["END"]}


def load(gateway: Gateway, key: str, **body: Any) -> Any:
    response = gateway.post("/admin/models/load", {"modelKey": key, **body})
    assert response.status_code == 200, response.text
    return response.json()


def unload(gateway: Gateway, status: int = 200, **body: Any) -> Any:
    response = gateway.post("/admin/models/unload", body)
    assert response.status_code == status, response.text
    return response.json()


def activate(gateway: Gateway, **body: Any) -> Any:
    response = gateway.post("/admin/models/activate", body)
    assert response.status_code == 200, response.text
    return response.json()


def active(gateway: Gateway) -> Any:
    return gateway.get("/admin/models").json()["active"]


def loaded(simulator: Simulator) -> set[str]:
    return {model["identifier"] for model in simulator.state()["loaded"]}


def test_a_load_activates_by_default(gateway: Gateway) -> None:
    assert load(gateway, SMALL, activate=False)["activated"] is False
    assert active(gateway) is None
    response = load(gateway, SMALL, instanceId="mine", defaultInference=DEFAULTS)
    assert response["activated"] is True
    assert active(gateway) == {
        "modelKey": SMALL,
        "instanceId": "mine",
        "defaultInference": DEFAULTS,
        "type": "llm",
        "loaded": True,
    }
    load(gateway, EMBEDDING, activate=False)
    assert active(gateway)["instanceId"] == "mine"


def test_an_activation_is_in_its_response_and_in_the_listing(
    gateway: Gateway, simulator: Simulator
) -> None:
    response = activate(gateway, modelKey=QWEN, instanceId="primary", defaultInference=DEFAULTS)
    assert response.pop("message")
    assert response == {
        "status": "activated",
        "modelKey": QWEN,
        "instanceId": "primary",
        "defaultInference": DEFAULTS,
    }
    assert active(gateway)["loaded"] is False
    assert loaded(simulator) == set()


def test_an_activation_replaces_the_whole_previous_one(gateway: Gateway) -> None:
    activate(gateway, modelKey=QWEN, instanceId="primary", defaultInference=DEFAULTS)
    assert activate(gateway, modelKey=EMBEDDING)["defaultInference"] == {}
    now = active(gateway)
    assert (now["instanceId"], now["defaultInference"], now["type"]) == (None, {}, "embedding")


def test_an_active_key_counts_as_loaded_while_any_instance_of_it_is(gateway: Gateway) -> None:
    activate(gateway, modelKey=SMALL)
    assert active(gateway)["loaded"] is False
    load(gateway, SMALL, instanceId="other-name", activate=False)
    assert active(gateway)["loaded"] is True


@pytest.mark.parametrize("body", [None, {}])
def test_deactivating_leaves_the_model_loaded(
    gateway: Gateway, simulator: Simulator, body: Any
) -> None:
    load(gateway, SMALL)
    response = gateway.post("/admin/models/deactivate", body)
    assert response.json() == {"status": "deactivated"}
    assert active(gateway) is None
    assert loaded(simulator) == {SMALL}
    error = gateway.post("/v1/chat/completions", {"messages": []}).json()["error"]
    assert error["code"] == "no_active_model"


@pytest.mark.parametrize("path", ["activate", "deactivate", "unload"])
def test_an_unknown_field_is_400(gateway: Gateway, path: str) -> None:
    response = gateway.post(f"/admin/models/{path}", {"modelKey": SMALL, "force": True})
    assert response.status_code == 400
    assert ["force"] in [detail["path"] for detail in response.json()["details"]]


def test_unloading_by_key_by_instance_and_by_both(gateway: Gateway, simulator: Simulator) -> None:
    for number in range(3):
        load(gateway, SMALL, instanceId=f"i{number}", activate=False)
    load(gateway, QWEN, activate=False)
    response = unload(gateway, modelKey=QWEN)
    assert response.pop("totalTimeMs") >= 0
    assert response == {
        "status": "unloaded",
        "modelKey": QWEN,
        "instanceId": QWEN,
        "message": "Model unloaded successfully via LM Studio SDK",
    }
    assert unload(gateway, instanceId="i0")["modelKey"] == SMALL
    assert unload(gateway, modelKey=SMALL, instanceId="i1")["instanceId"] == "i1"
    assert unload(gateway, modelKey=SMALL)["instanceId"] == "i2"
    assert loaded(simulator) == set()


def test_an_embedding_model_is_unloaded_too(gateway: Gateway, simulator: Simulator) -> None:
    load(gateway, EMBEDDING)
    unload(gateway, modelKey=EMBEDDING)
    assert loaded(simulator) == set()


@pytest.mark.parametrize(
    "body",
    [
        {"modelKey": QWEN, "instanceId": "mine"},
        {"modelKey": SMALL, "instanceId": "other"},
        {"instanceId": "other"},
        {"modelKey": QWEN},
        {"modelKey": "no-such-model"},
    ],
)
def test_unloading_an_instance_that_is_not_loaded_is_404(
    gateway: Gateway, simulator: Simulator, body: dict[str, str]
) -> None:
    load(gateway, SMALL, instanceId="mine")
    assert unload(gateway, 404, **body)["error"].startswith("Model not loaded: ")
    assert loaded(simulator) == {"mine"}
    assert active(gateway)["instanceId"] == "mine"


def test_unloading_a_key_with_several_instances_is_409(
    gateway: Gateway, simulator: Simulator
) -> None:
    load(gateway, SMALL, instanceId="a")
    load(gateway, SMALL, instanceId="b")
    error = unload(gateway, 409, modelKey=SMALL)["error"]
    assert "a, b" in error
    assert loaded(simulator) == {"a", "b"}


def test_unloading_the_active_model_clears_it(gateway: Gateway) -> None:
    load(gateway, SMALL, instanceId="first")
    load(gateway, SMALL, instanceId="second")
    unload(gateway, instanceId="first")
    assert active(gateway)["instanceId"] == "second"
    unload(gateway, modelKey=SMALL)
    assert active(gateway) is None


def test_an_active_key_is_cleared_with_its_last_instance(gateway: Gateway) -> None:
    load(gateway, SMALL, instanceId="a", activate=False)
    load(gateway, SMALL, instanceId="b", activate=False)
    activate(gateway, modelKey=SMALL)
    unload(gateway, instanceId="a")
    assert active(gateway)["modelKey"] == SMALL
    unload(gateway, instanceId="b")
    assert active(gateway) is None


def test_an_active_model_that_lm_studio_unloaded_is_shown_as_not_loaded(
    gateway: Gateway, simulator: Simulator
) -> None:
    load(gateway, SMALL)
    assert active(gateway)["loaded"] is True
    simulator.reset()
    assert active(gateway)["modelKey"] == SMALL
    assert active(gateway)["loaded"] is False
    assert unload(gateway, 404, modelKey=SMALL)["error"] == f"Model not loaded: {SMALL}"
