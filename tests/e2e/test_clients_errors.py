"""The gateway's own errors, as the openai and anthropic packages raise them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from tests.processes import Gateway, Simulator, free_port

MODEL = "qwen2-1.5b-instruct"
#: Settings of the strict gateway.
KEY, ADMIN_KEY, LIMIT = "inference-key-0123456789", "admin-key-0123456789abc", 100_000


@pytest.fixture(scope="module")
def unreachable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose LM Studio is not running."""
    dead = f"http://127.0.0.1:{free_port()}"
    gateway = Gateway(tmp_path_factory.mktemp("unreachable"), dead, WEB_CONCURRENCY=1)
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def other_machine(
    shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway whose allowlist lacks this machine's address."""
    gateway = Gateway(
        tmp_path_factory.mktemp("other_machine"),
        shared_simulator.url,
        IP_ALLOWLIST="10.1.2.3",
        WEB_CONCURRENCY=1,
    )
    yield gateway
    gateway.stop()


@pytest.mark.parametrize("key", ["wrong-key", "inference-key-012345678"])
def test_wrong_key(sdk: Callable[..., Any], strict: Gateway, key: str) -> None:
    client = sdk(strict, key)
    error = client.raised(401, client.ask, "invalid_api_key")
    assert "API key" in str(error)
    assert key not in error.response.text
    assert error.response.headers["www-authenticate"] == "Bearer"


def test_address_not_on_the_allowlist(sdk: Callable[..., Any], other_machine: Gateway) -> None:
    client = sdk(other_machine)
    error = client.raised(403, client.ask, "ip_not_allowed")
    assert "allowlist" in str(error)


def test_inference_key_where_an_admin_key_is_required(
    sdk: Callable[..., Any], strict: Gateway, simulator: Simulator
) -> None:
    client = sdk(strict)
    error = client.raised(403, lambda: client.post(b"{}", "/api/v1/chat"))
    assert error.response.json()["error"]["code"] == "admin_key_required"
    assert "admin key" in str(error)
    assert simulator.requests() == []


@pytest.mark.parametrize(
    "content",
    [b'{"model": ', b"", b"[1]", b'"text"', b"null", b'{"a": NaN}', b'{"a": "\xff"}', b"{} {}",
     b'{"a": 1,}', b"{'a': 1}", b"[" * 100_000, b'{"a":' * 19_000],
    ids=lambda content: repr(content[:12]),
)  # fmt: skip
def test_invalid_json(
    sdk: Callable[..., Any], strict: Gateway, simulator: Simulator, content: bytes
) -> None:
    client = sdk(strict)
    error = client.raised(400, lambda: client.post(content), "invalid_json")
    assert "JSON" in str(error)
    assert simulator.requests() == []


def test_body_too_large(sdk: Callable[..., Any], strict: Gateway, simulator: Simulator) -> None:
    client = sdk(strict)
    error = client.raised(413, lambda: client.ask(model="m" * LIMIT), "body_too_large")
    assert str(LIMIT) in str(error)
    assert simulator.requests() == []


def test_chunked_body_too_large(
    sdk: Callable[..., Any], strict: Gateway, simulator: Simulator
) -> None:
    client = sdk(strict)
    pieces = (b" " * 10_000 for _ in range(LIMIT // 10_000 + 1))
    client.raised(413, lambda: client.post(pieces), "body_too_large")
    assert simulator.requests() == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Authorization": f"Bearer {KEY}"}, 413), ({}, 401)],
    ids=["too-large", "no-key"],
)
def test_rejected_before_the_body_is_read(
    strict: Gateway, headers: dict[str, str], status: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", strict.port, timeout=10)
    length = {"Content-Length": str(LIMIT + 1), "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", headers={**headers, **length})
    response = connection.getresponse()
    assert response.status == status
    assert set(json.loads(response.read())["error"]) == {"message", "type", "param", "code"}
    connection.close()


@pytest.mark.parametrize("model", [None, ""])
def test_no_model_and_none_active(
    sdk: Callable[..., Any], strict: Gateway, simulator: Simulator, model: Any
) -> None:
    client = sdk(strict)
    error = client.raised(400, lambda: client.ask(model=model), "no_active_model")
    assert "/admin/models/activate" in str(error)
    assert simulator.requests() == []


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_lmstudio_unreachable(sdk: Callable[..., Any], unreachable: Gateway, stream: bool) -> None:
    client = sdk(unreachable)
    error = client.raised(503, lambda: client.ask(stream=stream), "lmstudio_unreachable")
    assert "LM Studio can't be reached" in str(error)


def test_a_conflict_is_not_retried(sdk: Callable[..., Any], strict: Gateway) -> None:
    client = sdk(strict, ADMIN_KEY)
    client.sdk = client.sdk.with_options(max_retries=2)
    sent: list[httpx2.Request] = []
    client.sdk._client.event_hooks["request"].append(sent.append)
    load = json.dumps({"modelKey": MODEL, "instanceId": "twin"}).encode()
    client.post(load, "/admin/models/load")
    with pytest.raises(client.package.ConflictError) as caught:
        client.post(load, "/admin/models/load")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(sent) == 2


def test_a_valid_request_id_is_kept(sdk: Callable[..., Any], strict: Gateway) -> None:
    client = sdk(strict)
    named = {"X-Request-Id": "my-own-id-1"}
    error = client.raised(429, lambda: client.ask("status-429", headers=named))
    assert error.response.headers["x-request-id"] == "my-own-id-1"
