"""``loadConfig`` converts to LM Studio's KV fields and back."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.errors import BadRequest
from gateway.lmstudio.load_config import FIELDS, differences, from_kv, to_kv

#: Each plain field with a value, its KV key for an LLM and the value in LM Studio's form.
PLAIN: list[tuple[str, Any, str, Any]] = [
    ("contextLength", 8192, "llm.load.contextLength", 8192),
    ("cpuThreads", 6, "llm.load.llama.cpuThreadPoolSize", 6),
    (
        "ropeFrequencyBase",
        10000,
        "llm.load.llama.ropeFrequencyBase",
        {"checked": True, "value": 10000},
    ),
    (
        "ropeFrequencyScale",
        0.5,
        "llm.load.llama.ropeFrequencyScale",
        {"checked": True, "value": 0.5},
    ),
    ("evalBatchSize", 256, "llm.load.llama.evalBatchSize", 256),
    ("flashAttention", True, "llm.load.llama.flashAttention", True),
    ("keepModelInMemory", False, "llm.load.llama.keepModelInMemory", False),
    ("tryMmap", False, "llm.load.llama.tryMmap", False),
    ("useFp16ForKVCache", False, "llm.load.llama.useFp16ForKVCache", False),
    (
        "llamaKCacheQuantizationType",
        "q8_0",
        "llm.load.llama.kCacheQuantizationType",
        {"checked": True, "value": "q8_0"},
    ),
    (
        "llamaVCacheQuantizationType",
        "q4_0",
        "llm.load.llama.vCacheQuantizationType",
        {"checked": True, "value": "q4_0"},
    ),
    ("offloadKVCacheToGpu", False, "llm.load.offloadKVCacheToGpu", False),
    ("numExperts", 2, "llm.load.numExperts", 2),
    ("seed", 42, "llm.load.seed", {"checked": True, "value": 42}),
    ("gpuStrictVramCap", True, "load.gpuStrictVramCap", True),
    ("numParallelSessions", 3, "llm.load.numParallelSessions", 3),
    ("useUnifiedKvCache", False, "llm.load.useUnifiedKvCache", False),
    ("numCpuExpertLayersRatio", 0.25, "llm.load.numCpuExpertLayersRatio", 0.25),
]
EMBEDDING = {
    "contextLength",
    "ropeFrequencyBase",
    "ropeFrequencyScale",
    "evalBatchSize",
    "keepModelInMemory",
    "tryMmap",
    "seed",
    "gpuStrictVramCap",
}


def sent(config: dict[str, Any], model_type: str = "llm") -> dict[str, Any]:
    return {field["key"]: field["value"] for field in to_kv(config, model_type)[0]}


def test_this_files_table_has_every_field() -> None:
    assert [row[0] for row in PLAIN] == [field.name for field in FIELDS]


@pytest.mark.parametrize(("name", "value", "key", "form"), PLAIN)
def test_a_field_converts_to_lm_studios_form_and_back(
    name: str, value: Any, key: str, form: Any
) -> None:
    fields, warnings = to_kv({name: value}, "llm")
    assert fields == [{"key": key, "value": form}]
    assert warnings == []
    assert from_kv(fields) == {name: value}


def test_an_embedding_model_gets_its_own_keys_and_warnings_for_fields_it_lacks() -> None:
    config = {name: value for name, value, _, _ in PLAIN}
    fields, warnings = to_kv(config | {"gpu": {"ratio": 0.5}}, "embedding")
    assert {field["key"] for field in fields} == {
        "embedding.load.contextLength",
        "embedding.load.llama.ropeFrequencyBase",
        "embedding.load.llama.ropeFrequencyScale",
        "embedding.load.llama.evalBatchSize",
        "embedding.load.seed",
        "load.gpuStrictVramCap",
        "embedding.load.llama.keepModelInMemory",
        "embedding.load.llama.tryMmap",
        "embedding.load.llama.acceleration.offloadRatio",
    }
    assert {warning.partition(":")[0] for warning in warnings} == set(config) - EMBEDDING
    assert set(from_kv(fields)) == EMBEDDING | {"gpu"}


def test_a_cache_type_of_false_is_an_unchecked_checkbox() -> None:
    key = "llm.load.llama.kCacheQuantizationType"
    assert sent({"llamaKCacheQuantizationType": False}) == {key: {"checked": False}}
    assert from_kv([{"key": key, "value": {"checked": False, "value": "f16"}}]) == {
        "llamaKCacheQuantizationType": False
    }


@pytest.mark.parametrize("ratio", [0, 0.5, 1, 1.0, "max", "off"])
def test_a_gpu_ratio_is_sent_as_it_is(ratio: Any) -> None:
    fields, warnings = to_kv({"gpu": {"ratio": ratio}}, "llm")
    assert fields == [{"key": "llm.load.llama.acceleration.offloadRatio", "value": ratio}]
    assert warnings == []
    assert from_kv(fields) == {"gpu": {"ratio": ratio}}


def test_layers_beside_a_ratio_get_a_warning() -> None:
    fields, (warning,) = to_kv({"gpu": {"ratio": 0.5, "layers": 20}}, "llm")
    assert fields == [{"key": "llm.load.llama.acceleration.offloadRatio", "value": 0.5}]
    assert warning.startswith("gpu.layers: ")


def test_zero_layers_mean_a_ratio_of_0() -> None:
    fields, warnings = to_kv({"gpu": {"layers": 0}}, "llm")
    assert fields == [{"key": "llm.load.llama.acceleration.offloadRatio", "value": 0}]
    assert warnings == []


def test_layers_alone_are_rejected_with_the_reason() -> None:
    with pytest.raises(BadRequest) as caught:
        to_kv({"gpu": {"layers": 20}}, "llm")
    (detail,) = caught.value.details or []
    assert detail["path"] == ["loadConfig", "gpu", "layers"]
    assert "ratio" in detail["message"]


@pytest.mark.parametrize(
    ("gpu", "strategy", "priority", "disabled"),
    [
        ({"mainGpu": 1}, "priorityOrder", [1], []),
        ({"mainGpu": 0, "splitStrategy": "favorMainGpu"}, "priorityOrder", [0], []),
        ({"splitStrategy": "favorMainGpu"}, "priorityOrder", [], []),
        ({"splitStrategy": "evenly"}, "evenly", [], []),
        ({"disabledGpus": [1, 2]}, "evenly", [], [1, 2]),
        ({"disabledGpus": [2], "mainGpu": 0}, "priorityOrder", [0], [2]),
    ],
)
def test_the_split_fields_convert_to_one_split_config_and_back(
    gpu: dict[str, Any], strategy: str, priority: list[int], disabled: list[int]
) -> None:
    fields, warnings = to_kv({"gpu": gpu}, "llm")
    split = {
        "strategy": strategy,
        "disabledGpus": disabled,
        "priority": priority,
        "customRatio": [],
    }
    assert fields == [{"key": "load.gpuSplitConfig", "value": split}]
    assert warnings == []
    assert from_kv(fields)["gpu"].items() >= gpu.items()
    assert differences({"gpu": gpu}, from_kv(fields)) == []


def test_a_main_gpu_of_an_even_split_gets_one_warning() -> None:
    gpu = {"mainGpu": 1, "splitStrategy": "evenly"}
    fields, (warning,) = to_kv({"gpu": gpu}, "llm")
    assert warning.startswith("gpu.mainGpu: ")
    assert fields[0]["value"]["priority"] == []
    assert differences({"gpu": gpu}, from_kv(fields)) == []


def test_an_empty_config_sends_nothing() -> None:
    assert to_kv({}, "llm") == to_kv({"gpu": {}}, "llm") == ([], [])


def test_keys_that_only_lm_studio_knows_are_left_out_of_the_applied_config() -> None:
    fields = [
        {"key": "llm.load.llama.autoFit", "value": True},
        {"key": "llm.load.contextLength", "value": 4096},
        {},
    ]
    assert from_kv(fields) == {"contextLength": 4096}


@pytest.mark.parametrize(
    ("requested", "applied", "paths"),
    [
        ({"contextLength": 8192}, {"contextLength": 8192}, []),
        ({"contextLength": 8192}, {"contextLength": 4096}, ["contextLength"]),
        ({"contextLength": 8192}, {}, ["contextLength"]),
        ({"ropeFrequencyScale": 1}, {"ropeFrequencyScale": 1.0}, []),
        ({"gpu": {"ratio": "max"}}, {"gpu": {"ratio": 1}}, []),
        ({"gpu": {"ratio": 0}}, {"gpu": {"ratio": "off"}}, []),
        ({"gpu": {"ratio": 0.5}}, {"gpu": {"ratio": "max"}}, ["gpu.ratio"]),
        ({"gpu": {"layers": 0}}, {"gpu": {"ratio": "off"}}, []),
        ({"gpu": {"ratio": 0.5, "mainGpu": 1}}, {}, ["gpu.ratio", "gpu.mainGpu"]),
        ({"gpu": {"disabledGpus": [1]}}, {"gpu": {"disabledGpus": []}}, ["gpu.disabledGpus"]),
        ({"llamaKCacheQuantizationType": False}, {}, []),
        (
            {"llamaKCacheQuantizationType": False},
            {"llamaKCacheQuantizationType": "q8_0"},
            ["llamaKCacheQuantizationType"],
        ),
        ({"flashAttention": False}, {"flashAttention": True}, ["flashAttention"]),
        ({"flashAttention": True}, {"flashAttention": False}, ["flashAttention"]),
        ({"flashAttention": False}, {}, ["flashAttention"]),
        ({"tryMmap": True}, {"tryMmap": 1}, []),
    ],
)
def test_every_field_that_was_not_applied_gets_a_warning(
    requested: dict[str, Any], applied: dict[str, Any], paths: list[str]
) -> None:
    assert [text.partition(":")[0] for text in differences(requested, applied)] == paths


def test_the_warning_names_both_values() -> None:
    (text,) = differences({"contextLength": 8192}, {"contextLength": 4096})
    assert "8192" in text
    assert "4096" in text
