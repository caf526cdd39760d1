"""The real OpenAI and Anthropic clients through the gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from tests.processes import Gateway, Simulator

SMALL = "qwen2-1.5b-instruct"
EMBEDDING = "text-embedding-nomic-embed-text-v1.5"
SLASH = "publisher/model-with-slash"
MESSAGES: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "count to 5"}]
COUNTED = "1 2 3 4 5"
Connect = Callable[..., openai.OpenAI]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Create OpenAI clients for a gateway, which are closed at the end of the test."""
    clients: list[openai.OpenAI] = []

    def connected(gateway: Gateway, key: str = "any", base: str = "/v1") -> openai.OpenAI:
        http = httpx.Client(trust_env=False)
        client = openai.OpenAI(base_url=gateway.url + base, api_key=key, http_client=http)
        clients.append(client)
        return client

    yield connected
    for client in clients:
        client.close()


@pytest.fixture(params=["/v1", ""], ids=["v1", "shorthand"])
def client(request: Any, gateway: Gateway, connect: Connect) -> openai.OpenAI:
    """A client of the gateway, which has an active model, with either base URL."""
    body = {"modelKey": SMALL, "defaultInference": {"maxTokens": 100}}
    assert gateway.post("/admin/models/activate", body).status_code == 200
    return connect(gateway, base=request.param)


@pytest.fixture
def claude(gateway: Gateway) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway.url, api_key="any") as client:
        yield client


def test_a_chat_without_a_model_gets_the_active_one(client: openai.OpenAI) -> None:
    response = client.chat.completions.create(model="", messages=MESSAGES)
    assert (response.choices[0].message.content or "").strip() == COUNTED
    assert response.model == SMALL
    assert response.usage is not None
    assert response.usage.completion_tokens == 5


def test_a_streamed_chat_has_no_usage_unless_requested(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="", messages=MESSAGES, stream=True))
    assert all(chunk.choices for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.strip() == COUNTED
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_streamed_chat_has_usage_when_requested(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=SMALL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


def test_completions_plain_and_streamed(client: openai.OpenAI) -> None:
    response = client.completions.create(model="", prompt="count to 5")
    assert response.choices[0].text.strip() == COUNTED
    stream = client.completions.create(model="", prompt="count to 5", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream).strip() == COUNTED


def test_embeddings_in_the_clients_own_encoding(client: openai.OpenAI, gateway: Gateway) -> None:
    response = client.embeddings.create(model=EMBEDDING, input=["a", "b"])
    assert [len(item.embedding) for item in response.data] == [8, 8]
    assert response.data[0].embedding != response.data[1].embedding
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="", input="a")
    assert (caught.value.code, caught.value.param) == ("no_active_model", "model")


def test_responses_plain_and_streamed(client: openai.OpenAI) -> None:
    response = client.responses.create(model="", input="count to 5")
    assert response.output_text.strip() == COUNTED
    assert response.usage is not None
    events = list(client.responses.create(model="", input="count to 5", stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas).strip() == COUNTED


def test_models_are_listed_and_retrieved(client: openai.OpenAI, simulator: Simulator) -> None:
    assert {SMALL, SLASH} <= {model.id for model in client.models.list()}
    assert client.models.retrieve(SMALL).id == SMALL
    assert client.models.retrieve(SLASH).id == SLASH
    assert simulator.last_request()["target"] == "/v1/models/publisher%2Fmodel-with-slash"


def test_lm_studios_errors_are_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="no-such", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert caught.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a cat", model="")


def test_no_active_model_is_the_clients_exception(gateway: Gateway, connect: Connect) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        connect(gateway).chat.completions.create(model="", messages=MESSAGES)
    assert caught.value.code == "no_active_model"


def test_keys_and_roles_are_the_clients_exceptions(
    launch: Callable[..., Gateway], connect: Connect
) -> None:
    gateway = launch(GATEWAY_API_KEY="app:user", GATEWAY_ADMIN_KEY="ops:root", WEB_CONCURRENCY=1)
    with pytest.raises(openai.AuthenticationError) as caught:
        connect(gateway, "wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id
    for key in ("user", "root"):
        assert connect(gateway, key).models.retrieve(SMALL).id == SMALL


def test_native_paths_are_for_admin_keys(
    launch: Callable[..., Gateway], connect: Connect, simulator: Simulator
) -> None:
    gateway = launch(GATEWAY_API_KEY="app:user", GATEWAY_ADMIN_KEY="ops:root", WEB_CONCURRENCY=1)
    with pytest.raises(openai.PermissionDeniedError) as caught:
        connect(gateway, "user", "/api/v0").models.list()
    assert caught.value.code == "admin_key_required"
    assert connect(gateway, "root", "/api/v0").models.list().data
    sent = dict(simulator.last_request()["headers"])
    assert not {"authorization", "x-api-key"} & {name.lower() for name in sent}


def test_anthropic_messages_plain_and_streamed(
    gateway: Gateway, claude: anthropic.Anthropic
) -> None:
    activated = {"modelKey": SMALL}
    assert gateway.post("/admin/models/activate", activated).status_code == 200
    message: Any = {"role": "user", "content": "count to 5"}
    response = claude.messages.create(model="", max_tokens=100, messages=[message])
    assert response.content[0].type == "text"
    assert response.content[0].text.strip() == COUNTED
    assert response.usage.output_tokens == 5
    with claude.messages.stream(model="", max_tokens=100, messages=[message]) as stream:
        assert "".join(stream.text_stream).strip() == COUNTED
        assert stream.get_final_message().usage.output_tokens == 5


def test_anthropic_errors_are_the_clients_exceptions(
    launch: Callable[..., Gateway], gateway: Gateway, claude: anthropic.Anthropic
) -> None:
    message: Any = {"role": "user", "content": "hello"}
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(model="", max_tokens=10, messages=[message])
    assert "activate" in str(caught.value)
    guarded = launch(GATEWAY_API_KEY="app:user", WEB_CONCURRENCY=1)
    stranger = claude.with_options(base_url=guarded.url, api_key="wrong")
    with pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(model=SMALL, max_tokens=10, messages=[message])
    known = claude.with_options(base_url=guarded.url, api_key="user")
    assert known.messages.create(model=SMALL, max_tokens=10, messages=[message]).content
