"""LM Studio's errors become those that clients of the dialect expect."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest

from gateway.errors import GatewayError
from gateway.proxy import repair
from tests.cpu_time import cpu_limit

UNEXPECTED = "Unexpected endpoint or method. (POST /v1/images/generations)"


def embedded(body: Any) -> GatewayError | None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return repair.embedded_error(content)


def wrapped_error(
    status: int, content: bytes, encoding: str | None = None, dialect: str = "openai"
) -> GatewayError | None:
    return repair.wrapped_error(status, content, encoding, dialect)


def found(error: GatewayError | None) -> GatewayError:
    assert error is not None
    return error


@pytest.mark.parametrize(
    ("body", "status", "message", "code"),
    [
        ({"error": UNEXPECTED}, 404, UNEXPECTED, "unknown_endpoint"),
        ({"error": {"message": UNEXPECTED}}, 404, UNEXPECTED, "unknown_endpoint"),
        ({"error": "Context overflow"}, 400, "Context overflow", "upstream_error"),
        ({"error": {"message": "no", "code": "my_code"}}, 400, "no", "my_code"),
        ({"error": {"message": "busy", "code": 503}}, 503, "busy", "upstream_error"),
        ({"error": "slow down", "status": 429}, 429, "slow down", "upstream_error"),
        ({"error": {"message": "x", "statusCode": 422}}, 422, "x", "upstream_error"),
        ({"error": {"message": "x", "code": 200}}, 400, "x", "upstream_error"),
        ({"type": "error", "error": {"type": "t", "message": "x"}}, 400, "x", "upstream_error"),
    ],
)
def test_an_error_inside_a_200_is_found(body: Any, status: int, message: str, code: str) -> None:
    content = json.dumps(body).encode()
    assert repair.starts_like_error(content)
    error = found(embedded(content))
    assert (error.status, error.message, error.code) == (status, message, code)


@pytest.mark.parametrize(
    "body",
    [
        {"id": "resp_1", "error": None, "object": "response"},
        {"id": "resp_1", "error": {"message": "x"}, "object": "response"},
        {"choices": [{"message": {"content": '"error"'}}]},
        {"error": None},
        {"error": ""},
        {"data": [], "error": "x"},
        ["error"],
        b'{"error": "broken',
        b'"error"',
        b"",
        b"[" * 100_000 + b'"error"',
    ],
    ids=lambda body: repr(body)[:30],
)
def test_a_regular_response_holds_no_error(body: Any) -> None:
    assert embedded(body) is None


def test_a_regular_response_does_not_start_like_an_error() -> None:
    for content in (b'{"id":"x","error":1}', b'{"errors":[]}', b"[]", b"", b'{"type":"message"}'):
        assert not repair.starts_like_error(content)


def test_the_members_of_an_error_object_are_kept() -> None:
    fields = {"message": "Invalid model", "param": "model", "code": "model_not_found"}
    error = found(embedded({"error": fields}))
    assert (error.param, error.code) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"error":"plain text"}', "plain text"),
        (b'{"error":{"message":5}}', "5"),
        (b'{"message":"outside"}', "outside"),
        (b"just text", "just text"),
        (b"", "LM Studio answered 500."),
        (b"[]", "[]"),
        (b"<html><style>p{}</style><h1>Bad</h1>\n<p>Gateway</p></html>", "Bad Gateway"),
        (b"caf\xe9", "caf\ufffd"),
        (b"<STYLE a='b'>p</style >x<script>1<b>2</script>y<style>never shown", "x y"),
        (b"1 < 2 <b>3</b>", "1 < 2 3"),
    ],
)
def test_an_error_body_that_no_dialect_knows_is_wrapped(content: bytes, message: str) -> None:
    error = found(wrapped_error(500, content))
    assert (error.status, error.message) == (500, message)


def test_an_error_object_of_the_dialect_is_left_as_it_is() -> None:
    openai = b'{"error":{"message":"x","type":"t","param":null,"code":null}}'
    anthropic = b'{"type":"error","error":{"type":"t","message":"x"}}'
    assert wrapped_error(400, openai) is None
    assert wrapped_error(400, anthropic, dialect="anthropic") is None
    assert found(wrapped_error(400, openai, dialect="anthropic")).message == "x"


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [("gzip", gzip.compress), ("X-GZIP", gzip.compress), ("deflate", zlib.compress)],
)
def test_a_compressed_error_is_decoded(encoding: str, encode: Any) -> None:
    assert found(wrapped_error(500, encode(b'{"error":"inner"}'), encoding)).message == "inner"


@pytest.mark.parametrize("encoding", ["br", "gzip", "deflate", "zstd"])
def test_an_error_in_an_unknown_or_broken_coding_is_left_as_it_is(encoding: str) -> None:
    assert wrapped_error(500, b"\x00not that coding", encoding) is None


@pytest.mark.parametrize("part", [b"<", b"<style>", b"<script", b"</style>", b"<p", b" "])
def test_the_work_for_a_page_grows_with_its_size(part: bytes) -> None:
    with cpu_limit(20):
        wrapped_error(500, part * 400_000)


def test_a_long_page_is_truncated() -> None:
    assert len(found(wrapped_error(500, b"<p>" + b"word " * 10_000)).message) <= 2000


@pytest.mark.parametrize(
    ("fields", "report"),
    [
        ({"message": "Unexpected token in: MARK"}, "(400 upstream_error): Unexpected token"),
        ({"message": UNEXPECTED}, "(404 unknown_endpoint): Unexpected endpoint or method"),
        ({"message": "MARK", "code": "my_code"}, "(400 my_code)"),
        ({"message": "MARK", "code": "MARK MARK"}, "(400 unknown code)"),
        ({"message": "MARK", "code": "x" * 65, "status": 503}, "(503 unknown code)"),
        (
            {"message": 'Invalid model identifier "MARK". MARK', "code": "model_not_found"},
            "(400 model_not_found): Invalid model identifier",
        ),
    ],
)
def test_the_report_of_an_error_holds_known_words_only(fields: dict[str, Any], report: str) -> None:
    error = found(embedded({"error": fields}))
    assert error.message == fields["message"]
    assert error.report == f"LM Studio responded with an error {report}"


def test_an_error_inside_a_compressed_200_is_found() -> None:
    error = repair.embedded_error(
        gzip.compress(b'{"error":"Unexpected endpoint or method."}'), "gzip"
    )
    assert found(error).status == 404
