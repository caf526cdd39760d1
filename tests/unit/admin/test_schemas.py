"""The admin bodies: which are accepted, and the error for each problem."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admin import schemas
from gateway.admin.views import parse_body
from gateway.errors import BadRequest
from gateway.lmstudio import load_config as loadconfig
from tests.cpu_time import cpu_limit

LOAD = schemas.LoadSchema()


def details(body: Any, schema: Any = LOAD) -> list[dict[str, Any]]:
    with pytest.raises(BadRequest) as caught:
        schemas.parse(schema, body)
    assert caught.value.message == "Validation failed"
    found = caught.value.details
    assert found
    json.dumps(found)  # they go into a response
    return found


def load_body(**load_config: Any) -> dict[str, Any]:
    return {"modelKey": "m", "loadConfig": load_config}


def test_the_load_config_has_exactly_the_fields_that_can_be_sent() -> None:
    known = set(schemas.LoadConfigSchema().fields)
    assert known == {"gpu"} | {field.name for field in loadconfig.FIELDS}


def test_a_full_body_comes_out_as_it_went_in() -> None:
    body = {
        "modelKey": "m",
        "instanceId": "i",
        "ttlSeconds": 60,
        "activate": False,
        "loadConfig": {
            "contextLength": 8192,
            "ropeFrequencyScale": 1,
            "seed": -1,
            "llamaKCacheQuantizationType": False,
            "gpu": {"ratio": 1, "mainGpu": 0, "splitStrategy": "evenly", "disabledGpus": [1]},
        },
        "defaultInference": {
            "temperature": 0,
            "maxTokens": 5,
            "topP": 1,
            "topK": 0,
            "repeatPenalty": 1.1,
            "stopStrings": ["a", "b"],
            "stream": True,
        },
    }
    parsed = schemas.parse(LOAD, body)
    assert json.dumps(parsed, sort_keys=True) == json.dumps(body, sort_keys=True)


WHOLE = ["contextLength", "cpuThreads", "evalBatchSize", "numExperts", "seed"]
FLAGS = ["flashAttention", "keepModelInMemory", "tryMmap", "gpuStrictVramCap", "useUnifiedKvCache"]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [True, "8", 8.0, 8.5, None, [8], {}, float("nan"), 10**30])
def test_only_a_whole_number_is_a_whole_number(name: str, value: Any) -> None:
    (detail,) = details(load_body(**{name: value}))
    assert detail["path"] == ["loadConfig", name]
    assert detail["message"]


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [0, 1, "true", None, "yes"])
def test_a_flag_is_only_true_or_false(name: str, value: Any) -> None:
    (detail,) = details(load_body(**{name: value}))
    assert detail["path"] == ["loadConfig", name]


@pytest.mark.parametrize("name", ["ropeFrequencyBase", "ropeFrequencyScale"])
@pytest.mark.parametrize("value", [True, "1", None, -1, float("nan"), float("inf")])
def test_a_number_is_finite_and_within_its_range(name: str, value: Any) -> None:
    assert details(load_body(**{name: value}))[0]["path"] == ["loadConfig", name]


@pytest.mark.parametrize(
    ("gpu", "path"),
    [
        ({"ratio": 1.5}, ["ratio"]),
        ({"ratio": -0.1}, ["ratio"]),
        ({"ratio": True}, ["ratio"]),
        ({"ratio": "half"}, ["ratio"]),
        ({"ratio": None}, ["ratio"]),
        ({"ratio": []}, ["ratio"]),
        ({"ratio": float("nan")}, ["ratio"]),
        ({"layers": -1}, ["layers"]),
        ({"mainGpu": "0"}, ["mainGpu"]),
        ({"splitStrategy": "oddly"}, ["splitStrategy"]),
        ({"disabledGpus": [0, True]}, ["disabledGpus", 1]),
        ({"disabledGpus": 0}, ["disabledGpus"]),
        ([], []),
        (None, []),
    ],
)
def test_the_gpu_object_is_checked(gpu: Any, path: list[Any]) -> None:
    (detail,) = details(load_body(gpu=gpu))
    assert detail["path"] == ["loadConfig", "gpu", *path]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -1),
        ("temperature", "0.7"),
        ("temperature", None),
        ("maxTokens", 0),
        ("maxTokens", 1.5),
        ("topP", 1.01),
        ("topK", -1),
        ("repeatPenalty", float("nan")),
        ("stopStrings", "stop"),
        ("stopStrings", [""]),
        ("stopStrings", [1]),
        ("stream", 1),
    ],
)
def test_default_inference_is_checked(name: str, value: Any) -> None:
    body = {"modelKey": "m", "defaultInference": {name: value}}
    for schema in (LOAD, schemas.ActivateSchema()):
        assert details(body, schema)[0]["path"][:2] == ["defaultInference", name]


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("context_length", "contextLength"),
        ("contextlength", "contextLength"),
        ("ContextLength", "contextLength"),
        ("contexLength", "contextLength"),
        ("flash_attention", "flashAttention"),
        ("cpu_threads", "cpuThreads"),
        ("cpuThreadPoolSize", "cpuThreads"),
        ("rope-frequency-base", "ropeFrequencyBase"),
    ],
)
def test_the_error_for_an_unknown_field_suggests_the_nearest_one(given: str, nearest: str) -> None:
    (detail,) = details(load_body(**{given: 1}))
    assert detail["path"] == ["loadConfig", given]
    assert repr(given) in detail["message"]
    assert repr(nearest) in detail["message"]


def test_the_error_for_a_field_like_no_other_lists_the_known_ones() -> None:
    (detail,) = details({"modelKey": "m", "zzz": 1})
    assert detail["path"] == ["zzz"]
    assert "ttlSeconds" in detail["message"]


def test_unknown_fields_are_found_on_all_levels_at_once() -> None:
    body = {
        "modelKey": "m",
        "ttl": 1,
        "loadConfig": {"gpu": {"ration": 1}, "sed": 1},
        "defaultInference": {"temprature": 1},
    }
    assert sorted(map(str, [detail["path"] for detail in details(body)])) == [
        "['defaultInference', 'temprature']",
        "['loadConfig', 'gpu', 'ration']",
        "['loadConfig', 'sed']",
        "['ttl']",
    ]


def test_unknown_and_invalid_fields_are_reported_together() -> None:
    found = details({"modelkey": "m", "ttlSeconds": "soon"})
    assert {detail["path"][0] for detail in found} == {"modelKey", "modelkey", "ttlSeconds"}


@pytest.mark.parametrize("value", [None, "", 5, [], "x" * 513])
@pytest.mark.parametrize("name", ["modelKey", "instanceId"])
def test_names_are_strings_of_limited_length(name: str, value: Any) -> None:
    assert details({"modelKey": "m", name: value})[0]["path"] == [name]


@pytest.mark.parametrize("value", [-1, 1.5, "60", True, None])
def test_the_ttl_is_a_whole_number_of_seconds(value: Any) -> None:
    assert details({"modelKey": "m", "ttlSeconds": value})[0]["path"] == ["ttlSeconds"]


@pytest.mark.parametrize("body", [None, [], "text", 5, True])
@pytest.mark.parametrize(
    "schema",
    [LOAD, schemas.UnloadSchema(), schemas.ActivateSchema(), schemas.DeactivateSchema()],
    ids=lambda schema: type(schema).__name__,
)
def test_a_body_must_be_an_object(schema: Any, body: Any) -> None:
    assert details(body, schema)[0]["path"] == []


def test_unload_needs_a_name() -> None:
    assert details({}, schemas.UnloadSchema())[0]["path"] == ["modelKey"]
    assert schemas.parse(schemas.UnloadSchema(), {"instanceId": "i"}) == {"instanceId": "i"}


def test_deactivate_takes_no_fields() -> None:
    assert schemas.parse(schemas.DeactivateSchema(), {}) == {}
    assert details({"force": True}, schemas.DeactivateSchema())[0]["path"] == ["force"]


@pytest.mark.parametrize(
    "body",
    [
        {f"unknown-{n}": n for n in range(100_000)},
        load_body(**{f"unknown-{n}": n for n in range(100_000)}),
        load_body(gpu={"disabledGpus": ["x"] * 500_000}),
        {"modelKey": "m", "defaultInference": {"stopStrings": [""] * 400_000}},
        {"modelKey": "m", "defaultInference": {"stopStrings": [""] * 64}},
        {"modelKey": "m", "x" * 1_000_000: 1},
    ],
    ids=lambda body: repr(body)[:40],
)
def test_a_large_wrong_body_gets_a_short_answer(body: dict[str, Any]) -> None:
    with cpu_limit(20):
        found = details(body)
    assert len(found) <= 20
    assert len(json.dumps(found)) < 20_000


def test_names_have_at_most_512_characters() -> None:
    schemas.parse(LOAD, {"modelKey": "m" * 512})
    for field in ("modelKey", "instanceId"):
        assert details({"modelKey": "m", field: "m" * 513})[0]["path"] == [field]


NAMES = st.sampled_from(
    [
        "modelKey",
        "instanceId",
        "loadConfig",
        "ttlSeconds",
        "defaultInference",
        "activate",
        "gpu",
        "ratio",
        "layers",
        "seed",
        "contextLength",
        "temperature",
        "stopStrings",
        "other",
    ]
)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.text(max_size=3)
    | st.sampled_from([10**400, -(10**400), 1e308, -1e308, 0.5, 10**20])
    | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=10,
)


@given(JSON_VALUES, st.sampled_from(["Load", "Unload", "Activate", "Deactivate"]))
def test_any_json_is_accepted_or_a_validation_error(body: Any, name: str) -> None:
    with suppress(BadRequest):
        json.dumps(schemas.parse(getattr(schemas, f"{name}Schema")(), body))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'\xef\xbb\xbf{"modelKey":"m"}', "byte-order mark"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a":NaN}', "not valid JSON"),
        (b'{"a":"\xff"}', "not valid JSON"),
        (b"", "not valid JSON"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_malformed_body_is_invalid_json(content: bytes, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        parse_body(content)
    assert caught.value.code == "invalid_json"
