"""Model management over HTTP, against the simulator through the real SDK."""

from __future__ import annotations

from typing import Any

import pytest

from tests.processes import Gateway, Simulator, eventually

QWEN = "qwen2.5-7b-instruct"
SMALL = "qwen2-1.5b-instruct"
EMBEDDING = "text-embedding-nomic-embed-text-v1.5"
TOO_LARGE = "deepseek-r1-671b"

CHECKED = {"checked": True}
#: Every field of loadConfig: its value, its KV key and LM Studio's form of the value.
EVERY_FIELD: list[tuple[str, Any, str, Any]] = [
    ("contextLength", 8192, "llm.load.contextLength", 8192),
    ("cpuThreads", 6, "llm.load.llama.cpuThreadPoolSize", 6),
    ("ropeFrequencyBase", 10000, "llm.load.llama.ropeFrequencyBase", CHECKED | {"value": 10000}),
    ("ropeFrequencyScale", 0.5, "llm.load.llama.ropeFrequencyScale", CHECKED | {"value": 0.5}),
    ("evalBatchSize", 256, "llm.load.llama.evalBatchSize", 256),
    ("flashAttention", True, "llm.load.llama.flashAttention", True),
    ("keepModelInMemory", False, "llm.load.llama.keepModelInMemory", False),
    ("tryMmap", False, "llm.load.llama.tryMmap", False),
    ("useFp16ForKVCache", False, "llm.load.llama.useFp16ForKVCache", False),
    (
        "llamaKCacheQuantizationType",
        "q8_0",
        "llm.load.llama.kCacheQuantizationType",
        CHECKED | {"value": "q8_0"},
    ),
    (
        "llamaVCacheQuantizationType",
        "q4_0",
        "llm.load.llama.vCacheQuantizationType",
        CHECKED | {"value": "q4_0"},
    ),
    ("offloadKVCacheToGpu", False, "llm.load.offloadKVCacheToGpu", False),
    ("numExperts", 2, "llm.load.numExperts", 2),
    ("seed", 42, "llm.load.seed", CHECKED | {"value": 42}),
    ("gpuStrictVramCap", True, "load.gpuStrictVramCap", True),
    ("numParallelSessions", 3, "llm.load.numParallelSessions", 3),
    ("useUnifiedKvCache", False, "llm.load.useUnifiedKvCache", False),
    ("numCpuExpertLayersRatio", 0.25, "llm.load.numCpuExpertLayersRatio", 0.25),
]
GPU = {"ratio": 0.5, "mainGpu": 1, "splitStrategy": "favorMainGpu", "disabledGpus": [2]}
SPLIT = {"strategy": "priorityOrder", "disabledGpus": [2], "priority": [1], "customRatio": []}


def load(gateway: Gateway, key: str, status: int = 200, **body: Any) -> Any:
    response = gateway.post("/admin/models/load", {"modelKey": key, **body})
    assert response.status_code == status, response.text
    assert response.headers["X-Request-Id"]
    return response.json()


def active(gateway: Gateway) -> Any:
    return gateway.get("/admin/models").json()["active"]


# Listing


def test_the_listing_has_the_contracts_fields(gateway: Gateway) -> None:
    load(gateway, QWEN, instanceId="one", loadConfig={"contextLength": 8192}, ttlSeconds=60)
    load(gateway, EMBEDDING, activate=False)
    listing = gateway.get("/admin/models").json()
    assert set(listing) == {"loaded", "downloaded", "active"}
    by_name = {model["identifier"]: model for model in listing["loaded"]}
    assert set(by_name) == {"one", EMBEDDING}
    one = by_name["one"]
    assert one["path"].endswith(".gguf")
    assert (one["modelKey"], one["type"], one["contextLength"]) == (QWEN, "llm", 8192)
    assert one["ttlMs"] == 60_000
    assert by_name[EMBEDDING]["type"] == "embedding"
    assert by_name[EMBEDDING]["ttlMs"] is None
    downloaded = {model["modelKey"]: model for model in listing["downloaded"]}
    assert {QWEN, EMBEDDING, "publisher/model-with-slash"} <= set(downloaded)
    qwen = downloaded[QWEN]
    assert (qwen["size"], qwen["type"], qwen["format"]) == (4_680_000_000, "llm", "gguf")
    assert (qwen["maxContextLength"], qwen["architecture"]) == (32768, "qwen2")
    assert (qwen["vision"], qwen["trainedForToolUse"]) == (False, True)
    assert (qwen["quantization"]["name"], qwen["paramsString"]) == ("Q4_K_M", "7B")
    assert qwen["displayName"]
    assert qwen["path"]
    assert downloaded["llava-v1.6-mistral-7b"]["vision"] is True
    assert listing["active"]["instanceId"] == "one"
    assert listing["active"]["loaded"] is True


def test_a_model_of_an_unknown_kind_does_not_break_the_listing(
    gateway: Gateway, simulator: Simulator
) -> None:
    simulator.faults(unknown_model_type=True)
    response = gateway.get("/admin/models")
    assert response.status_code == 200
    kinds = {model["modelKey"]: model for model in response.json()["downloaded"]}
    assert kinds["future-reranker"]["type"] == "reranker"
    assert kinds["future-format-8b"]["format"] == "hologram"
    load(gateway, SMALL)


# Loading


def test_every_load_field_reaches_lm_studio_and_is_read_back(
    gateway: Gateway, simulator: Simulator
) -> None:
    config = {name: value for name, value, _, _ in EVERY_FIELD} | {"gpu": GPU}
    response = load(gateway, QWEN, instanceId="tuned", loadConfig=config)
    (attempt,) = simulator.state()["loads"]
    expected = {key: form for _, _, key, form in EVERY_FIELD}
    expected |= {"llm.load.llama.acceleration.offloadRatio": 0.5, "load.gpuSplitConfig": SPLIT}
    assert attempt["fields"].items() >= expected.items()
    assert attempt["ignored"] == {}
    assert response["appliedConfig"].items() >= config.items()
    assert response["warnings"] == []
    assert (response["status"], response["modelKey"]) == ("loaded", QWEN)
    assert (response["instanceId"], response["activated"]) == ("tuned", True)
    assert response["message"] == "Model loaded successfully via LM Studio SDK"
    assert response["totalTimeMs"] >= 400
    assert simulator.state()["warnings"] == []


def test_the_applied_config_is_shown_even_when_none_was_requested(gateway: Gateway) -> None:
    applied = load(gateway, SMALL)["appliedConfig"]
    assert applied["contextLength"] == 4096
    assert applied["gpu"]["ratio"] == "max"
    assert applied["flashAttention"] is False


def test_an_embedding_model_loads_with_warnings_for_what_it_lacks(
    gateway: Gateway, simulator: Simulator
) -> None:
    config = {"contextLength": 1024, "gpu": {"ratio": 0.5}, "flashAttention": True, "cpuThreads": 2}
    response = load(gateway, EMBEDDING, loadConfig=config)
    assert {text.partition(":")[0] for text in response["warnings"]} == {
        "flashAttention",
        "cpuThreads",
    }
    (attempt,) = simulator.state()["loads"]
    assert attempt["namespace"] == "embedding"
    assert attempt["fields"]["embedding.load.contextLength"] == 1024
    assert attempt["fields"]["embedding.load.llama.acceleration.offloadRatio"] == 0.5
    assert attempt["ignored"] == {}
    assert response["appliedConfig"]["contextLength"] == 1024


def test_layers_beside_a_ratio_are_a_warning_and_alone_an_error(
    gateway: Gateway, simulator: Simulator
) -> None:
    response = load(gateway, SMALL, loadConfig={"gpu": {"ratio": 0.5, "layers": 20}})
    assert [text.partition(":")[0] for text in response["warnings"]] == ["gpu.layers"]
    refused = load(gateway, SMALL, 400, loadConfig={"gpu": {"layers": 20}})
    assert refused["error"] == "Validation failed"
    assert refused["details"][0]["path"] == ["loadConfig", "gpu", "layers"]
    off = load(gateway, SMALL, loadConfig={"gpu": {"layers": 0}})
    assert off["warnings"] == []
    assert len(simulator.state()["loads"]) == 2


def test_several_instances_of_a_model_get_lm_studios_names(gateway: Gateway) -> None:
    names = [load(gateway, SMALL)["instanceId"] for _ in range(2)]
    names.append(load(gateway, SMALL, instanceId="mine")["instanceId"])
    assert names == [SMALL, f"{SMALL}:2", "mine"]
    loaded = gateway.get("/admin/models").json()["loaded"]
    assert {model["identifier"] for model in loaded} == set(names)


def test_an_unknown_model_is_404(gateway: Gateway) -> None:
    error = load(gateway, "no-such-model", 404)
    assert error["error"] == "Model not found: no-such-model"
    assert error["requestId"]


def test_an_instance_that_exists_is_409_without_retries(gateway: Gateway) -> None:
    load(gateway, SMALL, instanceId="taken")
    for key in (SMALL, QWEN, EMBEDDING):
        body = {"modelKey": key, "instanceId": "taken"}
        response = gateway.post("/admin/models/load", body)
        assert response.status_code == 409
        assert response.headers["x-should-retry"] == "false"
        assert "taken" in response.json()["error"]


def test_a_load_that_lm_studio_rejects_is_502_with_its_message(
    gateway: Gateway, simulator: Simulator
) -> None:
    error = load(gateway, TOO_LARGE, 502)["error"]
    assert "insufficient memory: the model needs about 404.00 GB" in error
    simulator.faults(fail_loads="the GPU is on fire")
    assert "the GPU is on fire" in load(gateway, SMALL, 502)["error"]
    assert active(gateway) is None
    simulator.faults(fail_loads=None)
    load(gateway, SMALL)


@pytest.mark.parametrize(
    ("body", "path", "words"),
    [
        ({}, ["modelKey"], "required"),
        ({"modelKey": SMALL, "ttl": 5}, ["ttl"], "ttlSeconds"),
        (
            {"modelKey": SMALL, "loadConfig": {"context_length": 1}},
            ["loadConfig", "context_length"],
            "contextLength",
        ),
        (
            {"modelKey": SMALL, "loadConfig": {"contextLength": 0}},
            ["loadConfig", "contextLength"],
            "1",
        ),
        ({"modelKey": SMALL, "ttlSeconds": 1.5}, ["ttlSeconds"], "whole number"),
        (
            {"modelKey": SMALL, "defaultInference": {"temperature": 9}},
            ["defaultInference", "temperature"],
            "2",
        ),
    ],
)
def test_an_invalid_body_is_400_with_the_path_of_each_problem(
    gateway: Gateway, simulator: Simulator, body: Any, path: list[str], words: str
) -> None:
    response = gateway.post("/admin/models/load", body)
    assert response.status_code == 400
    error = response.json()
    assert error["error"] == "Validation failed"
    assert [detail["path"] for detail in error["details"]] == [path]
    assert words in error["details"][0]["message"]
    assert simulator.state()["loads"] == []


@pytest.mark.parametrize("content", ["", "{", '{"a":NaN}', "[" * 100_000])
def test_a_body_that_is_not_json_is_400(gateway: Gateway, content: str) -> None:
    for path in ("load", "unload", "activate"):
        response = gateway.http.post(
            f"{gateway.url}/admin/models/{path}",
            data=content.encode(),
            headers={"Content-Type": "application/json"},
            timeout=10,
        )
        assert response.status_code == 400, path
        assert set(response.json()) == {"error", "requestId"}


def test_a_body_of_more_than_a_mebibyte_is_413(gateway: Gateway) -> None:
    for size, status in ((1 << 20, 400), ((1 << 20) + 1, 413)):
        response = gateway.http.post(
            f"{gateway.url}/admin/models/activate",
            data=b" " * size,
            headers={"Content-Type": "application/json"},
            timeout=10,
        )
        assert response.status_code == status


# TTL


@pytest.mark.parametrize("ttl", [{}, {"ttlSeconds": 0}])
def test_a_load_has_no_ttl_by_default(
    gateway: Gateway, simulator: Simulator, ttl: dict[str, int]
) -> None:
    load(gateway, SMALL, **ttl)
    (loaded,) = simulator.state()["loaded"]
    assert loaded["ttlMs"] is None
    assert gateway.get("/admin/models").json()["loaded"][0]["ttlMs"] is None


def test_an_active_model_that_expired_is_shown_as_not_loaded(
    gateway: Gateway, simulator: Simulator
) -> None:
    load(gateway, SMALL, ttlSeconds=1)
    # the load rather than the loaded model, which may already have expired
    assert simulator.state()["loads"][0]["ttlMs"] == 1000
    eventually(lambda: not simulator.state()["loaded"])
    assert active(gateway)["modelKey"] == SMALL
    assert active(gateway)["loaded"] is False
