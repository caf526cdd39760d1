"""The gateway's own errors, as the openai and the anthropic package raise them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from tests.processes import Gateway, Simulator, free_port

MODEL = "qwen2-1.5b-instruct"
#: The strict gateway's.
KEY, ADMIN_KEY, LIMIT = "inference-key-0123456789", "admin-key-0123456789abc", 100_000


@pytest.fixture(scope="module")
def unreachable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose LM Studio is not running."""
    dead = f"http://127.0.0.1:{free_port()}"
    gateway = Gateway(tmp_path_factory.mktemp("unreachable"), dead, WEB_CONCURRENCY=1)
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def foreign(
    shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway that is not meant for this machine."""
    gateway = Gateway(
        tmp_path_factory.mktemp("foreign"),
        shared_simulator.url,
        IP_ALLOWLIST="10.1.2.3",
        WEB_CONCURRENCY=1,
    )
    yield gateway
    gateway.stop()


@pytest.mark.parametrize("key", ["wrong-key", "inference-key-012345678"])
def test_wrong_key(sdk: Callable[..., Any], strict: Gateway, key: str) -> None:
    asking = sdk(strict, key)
    error = asking.raised(401, asking.ask, "invalid_api_key")
    assert "API key" in str(error)
    assert key not in error.response.text
    assert error.response.headers["www-authenticate"] == "Bearer"


def test_address_not_on_the_allowlist(sdk: Callable[..., Any], foreign: Gateway) -> None:
    asking = sdk(foreign)
    error = asking.raised(403, asking.ask, "ip_not_allowed")
    assert "allowlist" in str(error)


def test_inference_key_where_an_admin_key_is_needed(
    sdk: Callable[..., Any], strict: Gateway, simulator: Simulator
) -> None:
    asking = sdk(strict)
    error = asking.raised(403, lambda: asking.post(b"{}", "/api/v1/chat"))
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
    asking = sdk(strict)
    error = asking.raised(400, lambda: asking.post(content), "invalid_json")
    assert "JSON" in str(error)
    assert simulator.requests() == []


def test_body_too_large(sdk: Callable[..., Any], strict: Gateway, simulator: Simulator) -> None:
    asking = sdk(strict)
    error = asking.raised(413, lambda: asking.ask(model="m" * LIMIT), "body_too_large")
    assert str(LIMIT) in str(error)
    assert simulator.requests() == []


def test_chunked_body_too_large(
    sdk: Callable[..., Any], strict: Gateway, simulator: Simulator
) -> None:
    asking = sdk(strict)
    pieces = (b" " * 10_000 for _ in range(LIMIT // 10_000 + 1))
    asking.raised(413, lambda: asking.post(pieces), "body_too_large")
    assert simulator.requests() == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Authorization": f"Bearer {KEY}"}, 413), ({}, 401)],
    ids=["too-large", "no-key"],
)
def test_refused_before_the_body_is_read(
    strict: Gateway, headers: dict[str, str], status: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", strict.port, timeout=10)
    length = {"Content-Length": str(LIMIT + 1), "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", headers={**headers, **length})
    answer = connection.getresponse()
    assert answer.status == status
    assert set(json.loads(answer.read())["error"]) == {"message", "type", "param", "code"}
    connection.close()


@pytest.mark.parametrize("model", [None, ""])
def test_no_model_and_none_active(
    sdk: Callable[..., Any], strict: Gateway, simulator: Simulator, model: Any
) -> None:
    asking = sdk(strict)
    error = asking.raised(400, lambda: asking.ask(model=model), "no_active_model")
    assert "/admin/models/activate" in str(error)
    assert simulator.requests() == []


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_lmstudio_unreachable(sdk: Callable[..., Any], unreachable: Gateway, stream: bool) -> None:
    asking = sdk(unreachable)
    error = asking.raised(503, lambda: asking.ask(stream=stream), "lmstudio_unreachable")
    assert "LM Studio can't be reached" in str(error)


def test_a_conflict_is_not_retried(sdk: Callable[..., Any], strict: Gateway) -> None:
    asking = sdk(strict, ADMIN_KEY)
    asking.sdk = asking.sdk.with_options(max_retries=2)
    sent: list[httpx2.Request] = []
    asking.sdk._client.event_hooks["request"].append(sent.append)
    load = json.dumps({"modelKey": MODEL, "instanceId": "twin"}).encode()
    asking.post(load, "/admin/models/load")
    with pytest.raises(asking.package.ConflictError) as caught:
        asking.post(load, "/admin/models/load")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(sent) == 2


def test_a_sane_request_id_is_kept(sdk: Callable[..., Any], strict: Gateway) -> None:
    asking = sdk(strict)
    named = {"X-Request-Id": "my-own-id-1"}
    error = asking.raised(429, lambda: asking.ask("status-429", headers=named))
    assert error.response.headers["x-request-id"] == "my-own-id-1"
