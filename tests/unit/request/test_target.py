"""Where a request goes in LM Studio, and which targets are rejected."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import SHORTHAND, BadRequest, NotFound
from gateway.request import normalize, origin_form, upstream_target


def environ(raw: str) -> dict[str, Any]:
    path, _, query = raw.partition("?")
    decoded = unquote_to_bytes(path).decode("latin-1")
    return {"RAW_URI": raw, "PATH_INFO": decoded, "QUERY_STRING": query}


@pytest.mark.parametrize(
    ("raw", "sent"),
    [
        ("/v1/models", "/v1/models"),
        ("/v1/models?a=b&c=%20d", "/v1/models?a=b&c=%20d"),
        ("/v1/models?", "/v1/models?"),
        ("/v1/models?next=http://other/../x", "/v1/models?next=http://other/../x"),
        ("/v1/models/publisher%2Fmodel", "/v1/models/publisher%2Fmodel"),
        ("/v1/models/publisher%2fmodel", "/v1/models/publisher%2fmodel"),
        ("/v1/models/publisher/model", "/v1/models/publisher/model"),
        ("/v1/models/qwen2.5-7b..instruct", "/v1/models/qwen2.5-7b..instruct"),
        ("/v1/models/a%20b", "/v1/models/a%20b"),
        ("/v1/models/100%25", "/v1/models/100%25"),
        ("/v1/files/%E2%82%AC", "/v1/files/%E2%82%AC"),
        ("/v1/models/", "/v1/models"),
        ("/v1//models///", "/v1/models"),
        ("/models/", "/v1/models"),
        ("/v1/models/a%2F%2Fb%2F/", "/v1/models/a%2F%2Fb%2F"),
        ("/v1/models?a=//", "/v1/models?a=//"),
        ("/models/publisher%2Fmodel?x=1", "/v1/models/publisher%2Fmodel?x=1"),
        ("/api/v0/models", "/api/v0/models"),
        ("http://other.example/v1/models", "/v1/models"),
        ("http://other.example:99/v1/models?x", "/v1/models?x"),
        ("/v1/models#part", "/v1/models"),
    ],
)
def test_a_target_reaches_lm_studio_with_its_encoding_and_query(raw: str, sent: str) -> None:
    path, target = upstream_target(environ(raw))
    assert target == sent
    assert path == sent.partition("?")[0]


@pytest.mark.parametrize("path", sorted(SHORTHAND))
def test_a_shorthand_means_its_v1_path(path: str) -> None:
    assert upstream_target(environ(path + "?x=1")) == ("/v1" + path, f"/v1{path}?x=1")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../admin/models",
        "/v1/..",
        "/v1/./models",
        "/v1/%2e%2e/admin",
        "/v1/%2E%2e/admin",
        "/v1/.%2e/admin",
        "/v1/%252e%252e/admin",
        "/v1/%25252e%25252e/admin",
        "/v1/%2525252525252e%2525252525252e/admin",
        "/v1/models/..%2f..%2fadmin",
        "/v1/models/..%252fadmin",
        "/v1/..;/admin",
        "/v1/..;a=b/admin",
        "/v1/%2e%2e%3b/admin",
        "/v1/..\\admin",
        "/v1/\\admin",
        "/v1/%5cadmin",
        "/v1/%5Cadmin",
        "/v1/%255cadmin",
        "/v1/models/%00",
        "/v1/models/%2500",
        "/v1/models/%0d%0aX-Header:%201",
        "/v1/models/%7f",
        "//other.example/v1/models",
        "/%2fother.example/v1/models",
        "/%252fother.example/v1/models",
        "http://other.example//host/v1",
        "http://other.example/v1/../admin",
        "http:///../v1/models/..",
        "models",
        "*",
        "/v1/mo dels",
        "/v1/\u00fc",
    ],
)
def test_a_path_that_could_mean_another_place_is_rejected(path: str) -> None:
    with pytest.raises(BadRequest) as caught:
        upstream_target(environ(path))
    assert caught.value.code == "invalid_path"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/",
        "/v10/models",
        "/V1/models",
        "/%761/models",
        "/%76%31/models",
        "/api",
        "/api/",
        "/%61pi/v0/models",
        "/admin/models",
        "/nowhere",
        "http://other.example",
        "http://other.example/admin/models",
    ],
)
def test_a_path_that_the_proxy_does_not_serve_is_not_found(path: str) -> None:
    with pytest.raises(NotFound):
        upstream_target(environ(path))


@pytest.mark.parametrize(
    ("decoded", "sent"),
    [
        ("/v1/models/a b", "/v1/models/a%20b"),
        ("/v1/models/\xe2\x82\xac", "/v1/models/%E2%82%AC"),
        ("/v1/models/100%", "/v1/models/100%25"),
        ("/v1/models/a?b", "/v1/models/a%3Fb"),
    ],
)
def test_without_a_raw_target_the_decoded_path_is_encoded_again(decoded: str, sent: str) -> None:
    decoded_environ = {"PATH_INFO": decoded, "QUERY_STRING": "x=1"}
    assert upstream_target(decoded_environ) == (sent, sent + "?x=1")
    with pytest.raises(BadRequest):
        upstream_target({"PATH_INFO": "/v1/../admin", "QUERY_STRING": ""})


PIECES = st.sampled_from(
    ["/", "..", ".", "%2e", "%2f", "%5c", "%25", "\\", ";", "v1", "api", "admin", "a", "%00", "//"]
)


@given(st.lists(PIECES, max_size=12).map("".join))
def test_an_accepted_path_never_decodes_to_another_place(path: str) -> None:
    raw = "/v1/" + path
    try:
        sent, _ = upstream_target(environ(raw))
    except (BadRequest, NotFound):
        return
    assert sent == normalize(raw)
    decoded = sent
    for _ in range(10):
        assert decoded.startswith("/v1/")
        segments = [part.partition(";")[0] for part in decoded.replace("\\", "/").split("/")]
        assert ".." not in segments
        assert "." not in segments
        assert "\\" not in decoded
        decoded = unquote_to_bytes(decoded).decode("latin-1")


@pytest.mark.parametrize(
    ("path", "normal"),
    [
        ("/", "/"),
        ("/v1/models", "/v1/models"),
        ("/health/ready/", "/health/ready"),
        ("/health//ready", "/health/ready"),
        ("/admin///models//", "/admin/models"),
        ("/metrics/", "/metrics"),
        ("/debug", "/debug"),
        ("/debug/", "/debug/"),
        ("/debug//", "/debug/"),
        ("/debug/stream/", "/debug/stream"),
        ("//admin//models/", "//admin/models"),
        ("///", "//"),
        ("*", "*"),
    ],
)
def test_every_path_has_one_spelling(path: str, normal: str) -> None:
    assert normalize(path) == normal
    assert normalize(normal) == normal


def test_the_time_for_a_target_is_linear_in_its_length() -> None:
    """The bound is generous; an unanchored search took 0.1 s for 8 KB, and 16 times that here."""
    began = time.process_time()
    for target in ("a" * 32768, "a+" * 16384 + ":/", "http://" + "a" * 32768 + "@"):
        assert origin_form(target) is None
    normalize("/" + "//a" * 16384 + "/" * 32768)
    assert time.process_time() - began < 0.2
