"""The commands' HTTP client: the gateway's address, the key, and how responses are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests
import responses

from gateway.commands.client import BadUsage, ErrorResponse, Event, Remote, Unreachable, read_events

VARIABLES = ("GATEWAY_URL", "GATEWAY_HOST", "GATEWAY_PORT", "GATEWAY_API_KEY", "GATEWAY_ADMIN_KEY")
URL = "http://gateway.test:8002"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of the developer's own settings, and an empty current directory."""
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def key_of(gateway: Remote) -> str | bytes | None:
    return gateway._http.headers.get("X-API-Key")


# Address


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({}, "http://127.0.0.1:8002"),
        ({"GATEWAY_URL": "https://gateway.test/"}, "https://gateway.test"),
        ({"GATEWAY_URL": "http://gateway.test:8002/v1/"}, URL),
        ({"GATEWAY_URL": "http://gateway.test/llm/v1"}, "http://gateway.test/llm"),
        ({"GATEWAY_URL": "http://[::1]:8002"}, "http://[::1]:8002"),
        # the .env of a server has its address
        ({"GATEWAY_PORT": "9000", "GATEWAY_HOST": "0.0.0.0"}, "http://127.0.0.1:9000"),
        ({"GATEWAY_HOST": "192.168.1.10"}, "http://192.168.1.10:8002"),
        ({"GATEWAY_HOST": "::1"}, "http://[::1]:8002"),
        ({"GATEWAY_HOST": "unix:/run/gateway.sock"}, "http://127.0.0.1:8002"),
        ({"GATEWAY_URL": URL, "GATEWAY_PORT": "9000"}, URL),
    ],
)
@pytest.mark.parametrize("source", ["environment", "file"])
def test_the_url_comes_from_the_settings(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], url: str, source: str
) -> None:
    if source == "file":
        Path(".env").write_text("".join(f"{name}={text}\n" for name, text in settings.items()))
    for name, text in settings.items():
        if source == "environment":
            monkeypatch.setenv(name, text)
    assert Remote().url == url
    assert Remote("http://other.test").url == "http://other.test"


@pytest.mark.parametrize(
    "url",
    ["gateway", "gateway:8002", "ftp://gateway", "http://", "http://a b", "http://a:0", "http://[",
     "http://a:99999", "http://a?x=1", "http://a#x"],
)  # fmt: skip
def test_an_invalid_url_is_wrong_usage(url: str) -> None:
    with pytest.raises(BadUsage, match="example: http://") as caught:
        Remote(url)
    assert caught.value.exit_status == 2


def test_a_password_in_the_url_is_rejected_and_not_repeated() -> None:
    with pytest.raises(BadUsage, match="GATEWAY_API_KEY") as caught:
        Remote("http://me:hunter2@gateway.test")
    assert "hunter2" not in str(caught.value)


# Key


@pytest.mark.parametrize(
    ("environment", "file", "key"),
    [
        ("", "", None),
        ("GATEWAY_API_KEY=aaa", "", "aaa"),
        ("GATEWAY_API_KEY=app:aaa,bbb", "", "aaa"),
        ("GATEWAY_API_KEY=app:a:b", "", "a:b"),
        ("GATEWAY_API_KEY=aaa GATEWAY_ADMIN_KEY=ops:ccc,ddd", "", "ccc"),
        ("", "GATEWAY_API_KEY=aaa GATEWAY_ADMIN_KEY=ccc", "ccc"),
        ("", "GATEWAY_API_KEY=aaa GATEWAY_ADMIN_KEY=", "aaa"),
        # a key exported for another gateway is not mixed with a .env that happens to be here
        ("GATEWAY_API_KEY=aaa", "GATEWAY_ADMIN_KEY=ccc", "aaa"),
        ("GATEWAY_ADMIN_KEY=", "GATEWAY_ADMIN_KEY=ccc", "ccc"),
    ],
)
def test_the_key_is_the_first_admin_key_else_the_first_key(
    monkeypatch: pytest.MonkeyPatch, environment: str, file: str, key: str | None
) -> None:
    for setting in environment.split():
        monkeypatch.setenv(*setting.split("=", 1))
    Path(".env").write_text(file.replace(" ", "\n"))
    assert key_of(Remote(URL)) == key
    assert key_of(Remote(URL, "app:given")) == "app:given"  # literally


def test_the_error_for_an_invalid_key_does_not_contain_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadUsage, match="--key") as caught:
        Remote(URL, "hunter2\r\nX-Evil: 1")
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("GATEWAY_API_KEY", "hunter2 with space")
    with pytest.raises(BadUsage, match="GATEWAY_API_KEY") as caught:
        Remote(URL)
    assert "hunter2" not in str(caught.value)


# Responses


@responses.activate
def test_the_json_is_returned_unparsed() -> None:
    text = b'{"a":  1e400, "a": 2}'
    responses.get(f"{URL}/x", body=text, content_type="application/json; charset=utf-8")
    assert Remote(URL, "kkk").get("/x") == text
    assert responses.calls[0].request.headers["X-API-Key"] == "kkk"


@responses.activate
@pytest.mark.parametrize(("status", "exit_status"), [(400, 1), (401, 4), (403, 4), (503, 1)])
def test_an_error_has_the_gateways_message_details_and_request_id(
    status: int, exit_status: int
) -> None:
    details = [{"path": ["loadConfig", "gpu", "disabledGpus", 0], "message": "Bad."}]
    body = {"error": "Validation failed", "details": details, "requestId": "req_1"}
    responses.post(f"{URL}/x", json=body, status=status)
    with pytest.raises(ErrorResponse) as caught:
        Remote(URL).post("/x", {})
    assert caught.value.exit_status == exit_status
    lines = [f"Validation failed ({status}, request req_1)"]
    assert str(caught.value).split("\n") == [*lines, "  loadConfig.gpu.disabledGpus.0: Bad."]


@responses.activate
@pytest.mark.parametrize(
    ("status", "content_type", "body", "words"),
    [
        (200, "text/html", "<html>", "not a gateway's response: 200 OK"),
        (502, "text/html", "<html>", "not a gateway's response: 502 Bad Gateway"),
        (502, "application/json", "[]", "not a gateway's response: 502 Bad Gateway"),
        (204, "application/json", "", "not a gateway's response: 204"),
        (200, "application/json", '{"error": "Unexpected endpoint"}', "Unexpected endpoint"),
        (404, "application/json", '{"error": {"message": "Nothing"}}', r"Nothing \(404\)"),
    ],
)
def test_a_response_of_anything_but_a_gateway_is_an_error(
    status: int, content_type: str, body: str, words: str
) -> None:
    responses.get(f"{URL}/x", body=body, status=status, content_type=content_type)
    with pytest.raises(ErrorResponse, match=words) as caught:
        Remote(URL).get("/x")
    assert caught.value.exit_status == 1


@responses.activate
def test_a_redirect_is_reported_and_not_followed() -> None:
    responses.get(f"{URL}/x", status=301, headers={"Location": "https://gateway.test/x"})
    with pytest.raises(ErrorResponse, match="a redirect to https"):
        Remote(URL, "kkk").get("/x")
    assert len(responses.calls) == 1


@responses.activate
def test_a_broken_response_is_an_unreachable_gateway() -> None:
    broken = requests.exceptions.ChunkedEncodingError("Connection broken")
    responses.get(f"{URL}/x", body=broken)
    with pytest.raises(Unreachable, match="can't be reached: Connection broken"):
        Remote(URL).get("/x")


def test_events_are_read_from_lines() -> None:
    lines = [b"retry: 3000", b"id: 1", b"event: connected", b'data: {"a":": b"}', b""]
    lines += [b": keep-alive", b"", b"event:error", b"data:{}", b"", b"data: unfinished"]
    assert list(read_events(lines)) == [
        Event("1", "connected", '{"a":": b"}'),
        Event("", "error", "{}"),
    ]
