"""Error bodies in the three dialects."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway import errors
from gateway.errors import GatewayError


def render(error: GatewayError, path: str, **options: Any) -> tuple[str, dict[str, str], Any]:
    status, headers, body = errors.response(error, path, "req_1", **options)
    assert len(headers) == len(dict(headers))
    return status, dict(headers), json.loads(body) if body else None


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/chat/completions", "openai"),
        ("/v1/anything", "openai"),
        ("/v1", "openai"),
        ("/chat/completions", "openai"),
        ("/models", "openai"),
        ("/models/publisher/model", "openai"),
        ("/audio/transcriptions", "openai"),
        ("/api/v0/models", "openai"),
        ("/v1/messages", "anthropic"),
        ("/v1/messages/count_tokens", "anthropic"),
        ("/messages", "anthropic"),
        ("/v1/messagesque", "openai"),
        ("/admin/models", "admin"),
        ("/debug/status", "admin"),
        ("/health", "admin"),
        ("/metrics", "admin"),
        ("/", "admin"),
        ("/nowhere", "admin"),
        ("/v10/models", "admin"),
    ],
)
def test_the_path_decides_the_dialect(path: str, dialect: str) -> None:
    assert errors.dialect_of(path) == dialect


def test_openai_errors_have_all_four_members() -> None:
    error = errors.BadRequest("No model.", code="no_active_model", param="model")
    status, headers, body = render(error, "/v1/chat/completions")
    assert status == "400 Bad Request"
    assert headers["Content-Type"] == "application/json"
    assert body == {
        "error": {
            "message": "No model.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "no_active_model",
        }
    }
    assert render(errors.NotFound("?"), "/v1/x")[2]["error"]["param"] is None


def test_anthropic_errors_have_the_form_of_its_api() -> None:
    _, _, body = render(errors.Unauthorized("No key."), "/v1/messages")
    assert body == {
        "type": "error",
        "error": {"type": "authentication_error", "message": "No key."},
    }


def test_admin_errors_are_flat_with_details_and_request_id() -> None:
    details = [{"path": ["a"], "message": "b"}]
    _, _, body = render(
        errors.BadRequest("Validation failed", details=details), "/admin/models/load"
    )
    assert body == {"error": "Validation failed", "details": details, "requestId": "req_1"}
    assert "details" not in render(errors.NotFound("?"), "/admin/x")[2]


@pytest.mark.parametrize(
    ("error", "status", "header"),
    [
        (errors.Unauthorized, "401 Unauthorized", ("WWW-Authenticate", "Bearer")),
        (errors.Forbidden, "403 Forbidden", None),
        (errors.NotFound, "404 Not Found", None),
        (errors.Conflict, "409 Conflict", ("x-should-retry", "false")),
        (errors.BodyTooLarge, "413 ", None),
        (errors.BadGateway, "502 Bad Gateway", None),
        (errors.Unreachable, "503 Service Unavailable", ("Retry-After", "5")),
        (errors.UpstreamTimeout, "504 Gateway Timeout", None),
    ],
)
@pytest.mark.parametrize("path", ["/admin/models", "/v1/models", "/v1/messages"])
def test_each_error_class_has_its_status_and_headers(
    error: type[GatewayError], status: str, header: tuple[str, str] | None, path: str
) -> None:
    line, headers, _ = render(error("why"), path)
    assert line.startswith(status)
    if header:
        assert headers[header[0]] == header[1]


@pytest.mark.parametrize(
    ("status", "openai", "anthropic"),
    [
        (400, "invalid_request_error", "invalid_request_error"),
        (401, "authentication_error", "authentication_error"),
        (403, "permission_error", "permission_error"),
        (404, "invalid_request_error", "not_found_error"),
        (413, "invalid_request_error", "request_too_large"),
        (429, "rate_limit_error", "rate_limit_error"),
        (500, "server_error", "api_error"),
        (503, "server_error", "overloaded_error"),
        (504, "server_error", "timeout_error"),
    ],
)
def test_the_error_type_follows_from_status_and_dialect(
    status: int, openai: str, anthropic: str
) -> None:
    error = GatewayError("why", status=status)
    assert render(error, "/v1/models")[2]["error"]["type"] == openai
    assert render(error, "/v1/messages")[2]["error"]["type"] == anthropic


def test_a_response_to_head_has_the_length_but_no_body() -> None:
    error = errors.NotFound("?")
    _, headers, body = render(error, "/v1/models", method="HEAD")
    assert body is None
    assert headers["Content-Length"] == render(error, "/v1/models")[1]["Content-Length"]


def test_the_content_length_counts_bytes() -> None:
    status, headers, body = errors.response(errors.NotFound("ü€😀"), "/v1/x", "req_1")
    assert dict(headers)["Content-Length"] == str(len(body))
    assert "ü€😀".encode() in body
    assert status == "404 Not Found"


def test_a_lone_surrogate_from_a_client_is_written_as_valid_json() -> None:
    _, _, body = render(errors.NotFound("Model not found: \ud800x"), "/admin/models/load")
    assert body["error"] == "Model not found: \ud800x"


def test_a_status_without_a_phrase_is_unknown() -> None:
    assert errors.status_line(499).startswith("499 ")
    assert errors.status_line(599) == "599 Unknown"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('Failed to load "a \\"b\\" c": no memory', "Failed to load : no memory"),
        ("It can't fit: 'it's a prompt' is `too` “long” for «it»", "It can't fit: is for"),
        ('Unexpected token in: "{"a":"secret', "Unexpected token in:"),
        ("an open 'quotation", "an open"),
        ('an open "quotation\\', "an open"),
        ("word " * 1000, ("word " * 40).strip()),
        ('"' * 1_000_000, ""),
        ("'a" * 1_000_000, ""),
    ],
    ids=lambda value: value[:20],
)
def test_quoted_parts_are_removed_and_the_rest_is_cut(text: str, kept: str) -> None:
    assert errors.without_quotes(text) == kept


def test_the_report_of_an_error_is_cut() -> None:
    assert GatewayError("x" * 1000).report == "x" * 200
