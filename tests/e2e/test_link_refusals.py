"""What LM Studio refuses or garbles reaches the client in LM Studio's words, never as a 500."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.conftest import EventReader
from tests.processes import Gateway, Simulator

SMALL = "qwen2-1.5b-instruct"
WORDS = "The call was refused It is a bad day."
EVENTS = {"Accept": "text/event-stream"}


def last_event(content: bytes) -> tuple[str, Any]:
    name, data = content.decode().strip().rpartition("event: ")[2].split("\n")
    return name, json.loads(data.removeprefix("data: "))


@pytest.mark.parametrize("endpoint", ["listLoaded", "listDownloadedModels"])
def test_a_refused_listing_is_502_in_lm_studios_words(
    gateway: Gateway, simulator: Simulator, endpoint: str
) -> None:
    simulator.faults(refuse_rpc=endpoint)
    response = gateway.get("/admin/models")
    assert (response.status_code, response.json()["error"]) == (502, WORDS)


@pytest.mark.parametrize("endpoint", ["listLoaded", "listDownloadedModels"])
def test_a_load_whose_questions_are_refused_fails_in_lm_studios_words(
    gateway: Gateway, simulator: Simulator, listen: Any, endpoint: str
) -> None:
    simulator.faults(refuse_rpc=endpoint)
    reader: EventReader = listen(gateway)
    reader.until("connected")
    body = {"modelKey": SMALL, "instanceId": "one"}
    response = gateway.post("/admin/models/load", body)
    assert (response.status_code, response.json()["error"]) == (502, WORDS)
    response = gateway.post("/admin/models/load", body, headers=EVENTS)
    name, data = last_event(response.content)
    assert (name, data["status"], data["error"]) == ("error", 502, WORDS)
    assert reader.until("error", 2, operation="model_load")["error"] == WORDS


def test_a_refused_config_is_a_warning_of_a_load_that_succeeds(
    gateway: Gateway, simulator: Simulator
) -> None:
    simulator.faults(refuse_rpc="getLoadConfig")
    response = gateway.post("/admin/models/load", {"modelKey": SMALL})
    assert response.status_code == 200
    (warning,) = response.json()["warnings"]
    assert WORDS in warning


def test_a_refused_unload_is_502_in_lm_studios_words(
    gateway: Gateway, simulator: Simulator
) -> None:
    gateway.post("/admin/models/load", {"modelKey": SMALL})
    simulator.faults(refuse_rpc="unloadModel")
    response = gateway.post("/admin/models/unload", {"modelKey": SMALL})
    assert (response.status_code, response.json()["error"]) == (502, WORDS)


def test_a_load_whose_channel_closes_early_is_502(gateway: Gateway, simulator: Simulator) -> None:
    simulator.faults(close_loads=True, load_ms=20)
    response = gateway.post("/admin/models/load", {"modelKey": SMALL})
    assert response.status_code == 502
    assert "without saying that it succeeded" in response.json()["error"]
    response = gateway.post("/admin/models/load", {"modelKey": SMALL}, headers=EVENTS)
    name, data = last_event(response.content)
    assert (name, data["status"]) == ("error", 502)


def test_a_progress_that_is_no_number_from_0_to_1_is_not_passed_on(
    gateway: Gateway, simulator: Simulator
) -> None:
    simulator.faults(odd_progress=True, load_ms=20)
    response = gateway.post("/admin/models/load", {"modelKey": SMALL}, headers=EVENTS)
    lines = [line for line in response.text.split("\n") if line.startswith("data: ")]
    *progress, complete = [json.loads(line[6:], parse_constant=pytest.fail) for line in lines]
    assert complete["status"] == "loaded"
    assert [data["progressRaw"] for data in progress] == [0.0, 0.5, 1.0]


def test_unknown_frames_end_neither_the_socket_nor_what_waits_on_it(
    gateway: Gateway, simulator: Simulator
) -> None:
    for _ in range(4):  # both workers have connected then
        assert gateway.get("/admin/models").status_code == 200
    before = simulator.state()["sockets"]
    simulator.faults(odd_frames=True)
    for _ in range(6):
        assert gateway.get("/admin/models").status_code == 200
    assert gateway.post("/admin/models/load", {"modelKey": SMALL}).status_code == 200
    assert simulator.state()["sockets"] == before
    assert "Traceback" not in gateway.logged()


def test_activating_does_not_wait_for_a_frozen_lm_studio(
    gateway: Gateway, simulator: Simulator
) -> None:
    simulator.faults(silent_rpc=True)
    begun = time.monotonic()
    assert gateway.post("/admin/models/activate", {"modelKey": SMALL}).status_code == 200
    assert time.monotonic() - begun < 2


def test_embedding_models_get_their_batch_size_and_their_seed(
    gateway: Gateway, simulator: Simulator
) -> None:
    config = {"evalBatchSize": 256, "seed": 7}
    body = {"modelKey": "text-embedding-nomic-embed-text-v1.5", "loadConfig": config}
    response = gateway.post("/admin/models/load", body).json()
    assert response["warnings"] == []
    assert response["appliedConfig"].items() >= config.items()
    (sent,) = simulator.state()["loaded"]
    assert sent["fields"] == {
        "embedding.load.llama.evalBatchSize": 256,
        "embedding.load.seed": {"checked": True, "value": 7},
    }
