"""LM Studio's errors, as the openai and anthropic packages raise them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.processes import Gateway, Simulator

pytestmark = pytest.mark.both_servers

CRASH = "The model has crashed without additional information. (Exit code: 6)"


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("fault", ["close-before-head", "garbage-head"])
def test_lmstudio_breaks_off_the_exchange_before_responding(
    sdk: Callable[..., Any], strict: Gateway, simulator: Simulator, fault: str, stream: bool
) -> None:
    client = sdk(strict)
    error = client.raised(502, lambda: client.ask(fault, stream=stream), "bad_gateway")
    assert "LM Studio broke off the exchange" in str(error)
    assert len(simulator.requests()) == 1


@pytest.mark.parametrize("delay", ["Prefill", "Head-Delay"])
def test_proxy_timeout(sdk: Callable[..., Any], brief_timeout: Gateway, delay: str) -> None:
    client = sdk(brief_timeout)
    slow = {f"X-Simulator-{delay}-Ms": "30000"}
    error = client.raised(504, lambda: client.ask(headers=slow), "upstream_timeout")
    assert "in time" in str(error)


@pytest.mark.parametrize("fault", ["error-200", "error-200-object", "error-200-stream"])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_an_error_inside_a_200(
    sdk: Callable[..., Any], strict: Gateway, fault: str, stream: bool
) -> None:
    client = sdk(strict)
    error = client.raised(400, lambda: client.ask(fault, stream=stream))
    assert CRASH in str(error)


def test_context_overflow(sdk: Callable[..., Any], strict: Gateway) -> None:
    client = sdk(strict)
    long = [{"role": "user", "content": "word " * 5000}]
    error = client.raised(400, lambda: client.ask(messages=long))
    assert "greater than the context length" in str(error)


def test_unknown_endpoint(sdk: Callable[..., Any], strict: Gateway) -> None:
    client = sdk(strict)
    error = client.raised(404, lambda: client.post(b'{"model": "m"}', "/v1/nothing/here"))
    assert "Unexpected endpoint or method. (POST /v1/nothing/here)" in str(error)
    assert error.response.json()["error"]["code"]


def test_unknown_model_keeps_lmstudios_message(sdk: Callable[..., Any], strict: Gateway) -> None:
    client = sdk(strict)
    error = client.raised(400, lambda: client.ask(model="no-such-model"))
    assert 'Invalid model identifier "no-such-model"' in str(error)
    if client.dialect == "openai":
        assert (error.code, error.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("fault", "message"), [("refuse-500", "500 Internal Server Error"), ("error-string-500", CRASH)]
)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_an_error_body_that_is_not_an_error_object_is_wrapped(
    sdk: Callable[..., Any], strict: Gateway, fault: str, message: str, stream: bool
) -> None:
    client = sdk(strict)
    error = client.raised(500, lambda: client.ask(fault, stream=stream))
    assert message in str(error)
    assert "<" not in error.response.text


def test_rate_limit_keeps_its_retry_after(sdk: Callable[..., Any], strict: Gateway) -> None:
    client = sdk(strict)
    error = client.raised(429, lambda: client.ask("status-429"))
    assert "Too many requests." in str(error)
    assert error.response.headers["retry-after"] == "1"


@pytest.mark.parametrize("fault", ["break-stream", "error-in-stream-event"])
def test_an_error_in_the_middle_of_a_stream(
    sdk: Callable[..., Any], strict: Gateway, fault: str
) -> None:
    client = sdk(strict)
    with pytest.raises(client.package.APIError) as caught:
        list(client.ask(fault, stream=True))
    message = "LM Studio broke off the stream" if fault == "break-stream" else "crashed"
    assert message in str(caught.value) or message in str(caught.value.body)


@pytest.mark.parametrize("sdk", ["openai"], indirect=True)
def test_an_error_event_without_a_type_in_the_middle_of_a_stream(
    sdk: Callable[..., Any], strict: Gateway
) -> None:
    client = sdk(strict)
    with pytest.raises(client.package.APIError) as caught:
        list(client.ask("error-in-stream-data", stream=True))
    assert CRASH in str(caught.value.body)
