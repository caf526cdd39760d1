"""Injection adds what a request lacks, and changes nothing else in its body."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadRequest
from gateway.proxy.injection import ENDPOINTS, Prepared, prepare
from gateway.proxy.members import Members
from gateway.state import Active

CHAT = "/v1/chat/completions"
DEFAULTS = {
    "temperature": 0.5,
    "maxTokens": 7,
    "topP": 0.9,
    "topK": 40,
    "repeatPenalty": 1.1,
    "stopStrings": ["END", "ü"],
    "stream": False,
}
LLM = Active("key", "instance", "llm", DEFAULTS)
PLAIN = Active("key", None, "llm")
EMBEDDER = Active("embed-key", None, "embedding", DEFAULTS)

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
NAMES = st.sampled_from(["model", "temperature", "stream", "max_tokens", "a\\b", "ü"]) | st.text(
    st.characters(codec="utf-8"), max_size=6
)
FORMS = st.fixed_dictionaries(
    {
        "ensure_ascii": st.booleans(),
        "indent": st.sampled_from([None, 0, 2, "\t"]),
        "separators": st.sampled_from([None, (",", ":"), (" ,\r\n", " : ")]),
    }
)


def prepared(path: str, body: bytes, active: Active | None) -> Prepared:
    return prepare(ENDPOINTS[path], body, lambda: active)


def sent(path: str, body: dict[str, Any], active: Active | None) -> Any:
    return json.loads(prepared(path, json.dumps(body).encode(), active).body)


def rejection(path: str, body: bytes, active: Active | None = LLM) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        prepared(path, body, active)
    return caught.value


@given(
    members=st.dictionaries(NAMES, JSON_VALUES, max_size=5),
    inject=st.dictionaries(NAMES, JSON_VALUES, max_size=4),
    form=FORMS,
    around=st.tuples(st.sampled_from(["", " ", "\r\n\t"]), st.sampled_from(["", "\n "])),
)
def test_only_the_injected_members_change(
    members: dict[str, Any], inject: dict[str, Any], form: Any, around: tuple[str, str]
) -> None:
    body = (around[0] + json.dumps(members, **form) + around[1]).encode()
    assert Members(body).with_injected({}) is body
    names = {name: value for name, value in inject.items() if json.dumps(name) == f'"{name}"'}
    texts = {name: json.dumps(value) for name, value in names.items()}
    out = Members(body).with_injected(texts)
    assert json.loads(out) == members | names
    if not names.keys() & members.keys():
        opening = len(around[0]) + 1
        spliced = out[opening : len(out) - len(body) + opening]
        assert out.replace(spliced, b"", 1) == body or not spliced
        assert out[:opening] + out[opening + len(spliced) :] == body


@given(members=st.dictionaries(NAMES, JSON_VALUES, max_size=5), form=FORMS)
def test_a_body_that_lacks_nothing_is_sent_unchanged(members: dict[str, Any], form: Any) -> None:
    body = json.dumps({**members, "model": "named", "stream": False}, **form).encode()
    for path in ENDPOINTS:
        for active in (None, PLAIN):
            assert prepared(path, body, active).body is body


@given(members=st.dictionaries(NAMES, JSON_VALUES, max_size=5), form=FORMS)
def test_the_clients_values_win_over_the_defaults(members: dict[str, Any], form: Any) -> None:
    members.pop("stream", None)
    result = prepared("/v1/responses", json.dumps(members, **form).encode(), LLM)
    defaults = {"temperature": 0.5, "max_output_tokens": 7, "top_p": 0.9, "stream": False}
    model = members.get("model")
    named = {} if model not in (None, "") else {"model": "instance"}
    assert json.loads(result.body) == defaults | members | named


EXPECTED: dict[str, dict[str, Any]] = {
    CHAT: {
        "temperature": 0.5,
        "max_tokens": 7,
        "top_p": 0.9,
        "top_k": 40,
        "repeat_penalty": 1.1,
        "stop": ["END", "ü"],
        "stream": False,
    },
    "/v1/responses": {"temperature": 0.5, "max_output_tokens": 7, "top_p": 0.9, "stream": False},
    "/v1/messages": {
        "temperature": 0.5,
        "max_tokens": 7,
        "top_p": 0.9,
        "top_k": 40,
        "stop_sequences": ["END", "ü"],
        "stream": False,
    },
}
EXPECTED["/v1/completions"] = EXPECTED[CHAT]


@pytest.mark.parametrize("path", sorted(EXPECTED))
def test_each_endpoint_has_its_own_member_names(path: str) -> None:
    assert sent(path, {"x": 1}, LLM) == {"x": 1, "model": "instance", **EXPECTED[path]}
    assert sent(path, {}, PLAIN) == {"model": "key"}
    assert sent(path, {"model": "mine"}, LLM) == {"model": "mine", **EXPECTED[path]}


@pytest.mark.parametrize("path", sorted(EXPECTED))
@pytest.mark.parametrize("value", [None, 0, "", False, [], {"a": 1}])
def test_a_member_that_the_client_sent_is_never_replaced(path: str, value: Any) -> None:
    for name in EXPECTED[path]:
        assert sent(path, {"model": "m", name: value}, LLM)[name] == value


def test_embeddings_get_an_embedding_model_only() -> None:
    assert sent("/v1/embeddings", {"input": "x"}, EMBEDDER) == {"input": "x", "model": "embed-key"}
    for active in (LLM, None):
        assert rejection("/v1/embeddings", b"{}", active).code == "no_active_model"
    body = b'{"model": "named", "input": "x"}'
    assert prepared("/v1/embeddings", body, LLM).body is body


@pytest.mark.parametrize("path", sorted(ENDPOINTS))
@pytest.mark.parametrize("body", [b"{}", b'{"model":null}', b'{"model":""}'])
def test_a_request_without_any_model_is_rejected_with_advice(path: str, body: bytes) -> None:
    error = rejection(path, body, None)
    assert (error.code, error.param, error.status) == ("no_active_model", "model", 400)
    assert "/admin/models/activate" in error.message


@pytest.mark.parametrize("empty", [b"null", b'""', b' "" '])
def test_an_empty_model_is_replaced_in_place(empty: bytes) -> None:
    body = b'{"a": "\xc3\xbc", "model": ' + empty + b' , "b": 2.50}'
    out = prepared(CHAT, body, PLAIN).body
    assert out == body.replace(empty.strip(), b'"key"')


def test_max_completion_tokens_prevents_max_tokens() -> None:
    assert "max_tokens" not in sent(CHAT, {"max_completion_tokens": 5}, LLM)


@pytest.mark.parametrize(
    ("body", "model", "out"),
    [
        (b'{"model":"a","model":"b"}', "b", None),
        (b'{"model":null,"model":"b"}', "b", None),
        (b'{"model":"a","model":""}', "key", b'{"model":"a","model":"key"}'),
        (b'{"mod\\u0065l":"a"}', "a", None),
        (b'{"mod\\u0065l":null}', "key", b'{"mod\\u0065l":"key"}'),
        (b'{"model":"a\\/b"}', "a/b", None),
    ],
)
def test_duplicate_and_escaped_names_mean_what_they_mean_in_json(
    body: bytes, model: str, out: bytes | None
) -> None:
    result = prepared(CHAT, body, PLAIN)
    assert result.model == model
    assert result.body == (out or body)


@pytest.mark.parametrize(
    "value",
    [
        b"1e400",
        b"-0.0",
        b"1.10",
        b"9" * 5000,
        b"0." + b"1" * 5000,
        b'"\\ud800"',
        b'"\\u00fc\xc3\xbc\\/"',
        b"[" * 200 + b"]" * 200,
    ],
)
def test_every_other_value_keeps_its_bytes(value: bytes) -> None:
    body = b'{ "x" : ' + value + b', "seed":1}'
    assert prepared(CHAT, body, PLAIN).body == b'{"model":"key",' + body[1:]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"[]",
        b'"text"',
        b"5",
        b"null",
        b"{",
        b'{"a"}',
        b'{"a":}',
        b'{"a":1,}',
        b"{,}",
        b'{"a":1 "b":2}',
        b'{"a":1}{"b":2}',
        b'{"a":1}x',
        b"{'a':1}",
        b'{"a":NaN}',
        b'{"a":[Infinity]}',
        b'{"a":-Infinity}',
        b'{"a":01}',
        b'{"a":+1}',
        b'{"a":"\n"}',
        b'{"a\n":1}',
        b'\x0b{"a":1}',
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',
        b'\xef\xbb\xbf{"a":1}',
        '{"a":1}'.encode("utf-16"),
        '{"a":1}'.encode("utf-16-le"),
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b'{"a":' * 100_000,
    ],
    ids=lambda body: repr(body[:12]),
)
def test_a_body_that_is_not_a_json_object_in_utf8_is_rejected(body: bytes) -> None:
    assert rejection(CHAT, body).code == "invalid_json"


@pytest.mark.parametrize("odd", ['a"b\\c', "ü€😀", "tab\there", "\u2028", "\ud800"])
def test_any_name_of_the_active_model_arrives_as_valid_json(odd: str) -> None:
    active = Active(odd, None, "llm", {"stopStrings": [odd]})
    out = prepared(CHAT, b'{"a":1}', active).body
    assert json.loads(out) == {"a": 1, "model": odd, "stop": [odd]}


@pytest.mark.parametrize(
    ("body", "out", "added"),
    [
        (b'{"stream":true}', {"include_usage": True}, True),
        (b'{"stream":true,"stream_options":null}', {"include_usage": True}, True),
        (b'{"stream":true,"stream_options":{}}', {"include_usage": True}, True),
        (
            b'{"stream":true,"stream_options":{"x":1,"include_usage":false}}',
            {"x": 1, "include_usage": True},
            True,
        ),
        (b'{"stream":true,"stream_options":{"include_usage":true}}', None, False),
        (b'{"stream":true,"stream_options":[]}', None, False),
        (b'{"stream":false}', None, False),
        (b'{"stream":1}', None, False),
        (b"{}", None, False),
    ],
)
def test_usage_is_requested_unless_the_client_requests_it(
    body: bytes, out: Any, added: bool
) -> None:
    for path in (CHAT, "/v1/completions"):
        result = prepared(path, body, PLAIN)
        assert result.added_usage is added
        assert result.stream is (b'"stream":true' in body)
        if added:
            assert json.loads(result.body)["stream_options"] == out
        else:
            original = json.loads(body).get("stream_options")
            assert json.loads(result.body).get("stream_options") == original
    assert prepared("/v1/responses", body, PLAIN).added_usage is False


def test_an_injected_stream_member_makes_the_request_a_stream() -> None:
    result = prepared(CHAT, b'{"model":"m"}', Active("key", None, "llm", {"stream": True}))
    assert result.stream is result.added_usage is True
    assert result.requested_model == result.model == "m"
