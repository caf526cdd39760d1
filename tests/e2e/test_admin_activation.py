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
    answer = gateway.post("/admin/models/load", {"modelKey": key, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def unload(gateway: Gateway, status: int = 200, **body: Any) -> Any:
    answer = gateway.post("/admin/models/unload", body)
    assert answer.status_code == status, answer.text
    return answer.json()


def activate(gateway: Gateway, **body: Any) -> Any:
    answer = gateway.post("/admin/models/activate", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def active(gateway: Gateway) -> Any:
    return gateway.get("/admin/models").json()["active"]


def loaded(simulator: Simulator) -> set[str]:
    return {model["identifier"] for model in simulator.state()["loaded"]}


def test_a_load_activates_unless_told_otherwise(gateway: Gateway) -> None:
    assert load(gateway, SMALL, activate=False)["activated"] is False
    assert active(gateway) is None
    answer = load(gateway, SMALL, instanceId="mine", defaultInference=DEFAULTS)
    assert answer["activated"] is True
    assert active(gateway) == {
        "modelKey": SMALL,
        "instanceId": "mine",
        "defaultInference": DEFAULTS,
        "type": "llm",
        "loaded": True,
    }
    load(gateway, EMBEDDING, activate=False)
    assert active(gateway)["instanceId"] == "mine"


def test_an_activation_is_answered_and_shown(gateway: Gateway, simulator: Simulator) -> None:
    answer = activate(gateway, modelKey=QWEN, instanceId="primary", defaultInference=DEFAULTS)
    assert answer.pop("message")
    assert answer == {
        "status": "activated",
        "modelKey": QWEN,
        "instanceId": "primary",
        "defaultInference": DEFAULTS,
    }
    assert active(gateway)["loaded"] is False
    assert loaded(simulator) == set()


def test_an_activation_replaces_the_former_one_whole(gateway: Gateway) -> None:
    activate(gateway, modelKey=QWEN, instanceId="primary", defaultInference=DEFAULTS)
    assert activate(gateway, modelKey=EMBEDDING)["defaultInference"] == {}
    now = active(gateway)
    assert (now["instanceId"], now["defaultInference"], now["type"]) == (None, {}, "embedding")


def test_an_active_key_is_loaded_while_an_instance_of_it_is(gateway: Gateway) -> None:
    activate(gateway, modelKey=SMALL)
    assert active(gateway)["loaded"] is False
    load(gateway, SMALL, instanceId="other-name", activate=False)
    assert active(gateway)["loaded"] is True


@pytest.mark.parametrize("body", [None, {}])
def test_deactivating_leaves_the_model_loaded(
    gateway: Gateway, simulator: Simulator, body: Any
) -> None:
    load(gateway, SMALL)
    answer = gateway.post("/admin/models/deactivate", body)
    assert answer.json() == {"status": "deactivated"}
    assert active(gateway) is None
    assert loaded(simulator) == {SMALL}
    told = gateway.post("/v1/chat/completions", {"messages": []}).json()["error"]
    assert told["code"] == "no_active_model"


@pytest.mark.parametrize("path", ["activate", "deactivate", "unload"])
def test_a_field_nobody_knows_is_400(gateway: Gateway, path: str) -> None:
    answer = gateway.post(f"/admin/models/{path}", {"modelKey": SMALL, "force": True})
    assert answer.status_code == 400
    assert ["force"] in [detail["path"] for detail in answer.json()["details"]]


def test_unloading_by_key_by_instance_and_by_both(gateway: Gateway, simulator: Simulator) -> None:
    for number in range(3):
        load(gateway, SMALL, instanceId=f"i{number}", activate=False)
    load(gateway, QWEN, activate=False)
    answer = unload(gateway, modelKey=QWEN)
    assert answer.pop("totalTimeMs") >= 0
    assert answer == {
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
def test_what_is_not_loaded_cannot_be_unloaded(
    gateway: Gateway, simulator: Simulator, body: dict[str, str]
) -> None:
    load(gateway, SMALL, instanceId="mine")
    assert unload(gateway, 404, **body)["error"].startswith("Model not loaded: ")
    assert loaded(simulator) == {"mine"}
    assert active(gateway)["instanceId"] == "mine"


def test_a_key_of_several_instances_must_be_made_definite(
    gateway: Gateway, simulator: Simulator
) -> None:
    load(gateway, SMALL, instanceId="a")
    load(gateway, SMALL, instanceId="b")
    told = unload(gateway, 409, modelKey=SMALL)["error"]
    assert "a, b" in told
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
