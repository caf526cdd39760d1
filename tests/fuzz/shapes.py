"""Strategies for requests, from nearly valid to absurd."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

INFERENCE = (
    "/v1/chat/completions",
    "/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/messages",
    "/v1/embeddings",
)
ADMIN = tuple(f"/admin/models/{verb}" for verb in ("load", "unload", "activate", "deactivate"))
READING = ("/admin/models", "/debug/status", "/debug/metrics", "/health", "/metrics", "/v1/models")
MODELS = ("qwen2-1.5b-instruct", "qwen2.5-7b-instruct", "text-embedding-nomic-embed-text-v1.5")
_NUMBERS = [0, -1, 1, 2**31, 2**53 + 1, 2**64, -(2**63), 10**400, 1e308, 5e-324, 0.5, -0.0]
_WORDS = ["", " ", "\0", "a\r\nb: c", "\ud800", "\U0001f600", "../..", "%2e%2e", "__proto__", "max",
          "off", "null", "a" * 5000]  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One request."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(_NUMBERS),
    st.integers(),
    st.floats(),
    st.sampled_from([*_WORDS, *MODELS]),
    st.text(max_size=20),
)
_values = st.recursive(
    _scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=8) | st.sampled_from(_WORDS), inner, max_size=4),
    ),
    max_leaves=12,
)


def _objects(valid: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with members that an endpoint knows, their values valid or not, and unknown ones."""
    known = st.fixed_dictionaries(
        {}, optional={name: st.just(value) | _values for name, value in valid.items()}
    )
    unknown = st.dictionaries(st.text(max_size=10), _values, max_size=2)
    return st.builds(lambda first, second: {**second, **first}, known, unknown)


_load_config = _objects(
    {
        "contextLength": 4096,
        "gpu": {"ratio": 0.5},
        "cpuThreads": 4,
        "ropeFrequencyBase": 10000,
        "flashAttention": True,
        "evalBatchSize": 512,
        "seed": 1,
        "llamaKCacheQuantizationType": "q8_0",
    }
)
_defaults = _objects(
    {"temperature": 0.5, "maxTokens": 5, "topP": 0.9, "topK": 5, "repeatPenalty": 1.1,
     "stopStrings": ["x"], "stream": True}
)  # fmt: skip
_admin = st.builds(
    lambda base, config, defaults: base | config | defaults,
    _objects({"modelKey": MODELS[0], "instanceId": "one", "ttlSeconds": 5, "activate": True}),
    st.just({}) | st.builds(lambda value: {"loadConfig": value}, _load_config | _values),
    st.just({}) | st.builds(lambda value: {"defaultInference": value}, _defaults | _values),
)
_inference = _objects(
    {
        "model": MODELS[0],
        "messages": [{"role": "user", "content": "count to 2"}],
        "prompt": "count to 2",
        "input": "count to 2",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 5,
        "temperature": 0.1,
        "stop": ["x"],
    }
)


def _json(value: Any) -> bytes:
    """JSON, with NaN and lone surrogates as Python serializes them."""
    return json.dumps(value).encode()


def _corrupted(content: bytes, at: int, how: int) -> bytes:
    """The content cut off, doubled, with an invalid byte, or unchanged."""
    at = at % (len(content) + 1)
    return [content[:at], content + content, content[:at] + b"\xff" + content[at:], content][how]


_bodies = st.one_of(
    st.builds(_json, _admin),
    st.builds(_json, _inference),
    st.builds(_json, _values),
    st.builds(_corrupted, st.builds(_json, _admin | _inference), st.integers(0), st.integers(0, 3)),
    st.binary(max_size=200),
)
_field_text = st.text(
    st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40
)
_headers = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(
                ["Content-Type", "Accept", "Accept-Encoding", "Content-Encoding", "Range", "Cookie",
                 "X-Request-Id", "X-Forwarded-For", "Origin", "Last-Event-ID", "If-None-Match",
                 "Connection", "TE", "Authorization", "X-API-Key", "Access-Control-Request-Method"]
            ),
            _field_text,
        ),
        st.tuples(st.from_regex(r"X-[A-Za-z0-9-]{1,12}", fullmatch=True), _field_text),
    ),
    max_size=4,
    unique_by=lambda pair: pair[0].lower(),
)  # fmt: skip
_queries = st.sampled_from(["", "?", "?a=b", "?types=x", "?lastEventId=-1", "?%00", "?a=%ff&a"])

_lines = st.tuples(
    st.sampled_from(["POST"] * 8 + ["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "FOO"]),
    st.sampled_from((*INFERENCE, *ADMIN, *ADMIN, *READING)),
    _queries,
)
#: Generating headers and a body costs more than sending them, so they go to several paths.
batches = st.builds(
    lambda lines, headers, body: [
        Request(method, path + query, tuple(headers), body) for method, path, query in lines
    ],
    st.lists(_lines, min_size=8, max_size=8),
    _headers,
    _bodies,
)
