"""Every endpoint through the real clients: what LM Studio receives and what the client receives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from tests.processes import Gateway, Simulator

#: What the gateway runs under, and how the clients reach it.
pytestmark = pytest.mark.parametrize(
    ("server", "way"),
    [("gunicorn", "direct"), ("gunicorn", "nginx"), ("gevent", "direct")],
    indirect=["server"],
    scope="module",
)

LLM = "qwen2-1.5b-instruct"
EMBEDDING = "text-embedding-nomic-embed-text-v1.5"
TEXT = "1 2 3 4 5 6 7 "
#: Values that are easily changed when JSON is decoded and encoded again.
HARD = {"metadata": {"big": 12345678901234567890123, "half": 0.1, "text": "ä\u2028😀\\"}}
ASK_7 = [{"role": "user", "content": "please count to 7"}]

DEFAULTS = {
    "temperature": 0.25,
    "maxTokens": 4,
    "topP": 0.5,
    "topK": 11,
    "repeatPenalty": 1.25,
    "stopStrings": ["END", "\n\n"],
}
_OPENAI = {
    "temperature": 0.25,
    "max_tokens": 4,
    "top_p": 0.5,
    "top_k": 11,
    "repeat_penalty": 1.25,
    "stop": ["END", "\n\n"],
}


@dataclass(frozen=True)
class Endpoint:
    """One row of the injection table, with ``members`` as they are sent upstream."""

    path: str
    body: dict[str, Any]
    members: dict[str, Any]
    streams: bool = True
    usage_on_request: bool = False
    needed: dict[str, Any] = field(default_factory=dict)


ENDPOINTS = [
    Endpoint("/v1/chat/completions", {"messages": ASK_7}, _OPENAI, usage_on_request=True),
    Endpoint("/v1/completions", {"prompt": "count to 7"}, _OPENAI, usage_on_request=True),
    Endpoint(
        "/v1/responses",
        {"input": "count to 7"},
        {"temperature": 0.25, "max_output_tokens": 4, "top_p": 0.5},
    ),
    Endpoint(
        "/v1/messages",
        {"messages": ASK_7},
        {
            "temperature": 0.25,
            "max_tokens": 4,
            "top_p": 0.5,
            "top_k": 11,
            "stop_sequences": ["END", "\n\n"],
        },
        needed={"max_tokens": 100},
    ),
    Endpoint("/v1/embeddings", {"input": ["ä", "b"]}, {}, streams=False),
]
FORMS = [
    pytest.param(one, stream, id=one.path[4:] + ("-stream" if stream else "-plain"))
    for one in ENDPOINTS
    for stream in ([False, True] if one.streams else [False])
]


class Wiretap(httpx2.HTTPTransport):
    """httpx's transport, which records the bytes of the last exchange."""

    request = b""
    response = b""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.request, self.response = request.read(), b""
        response = super().handle_request(request)
        response.stream = _Recorded(response.stream, self)
        return response


class _Recorded(httpx2.SyncByteStream):
    def __init__(self, inner: Any, tap: Wiretap) -> None:
        self._inner = inner
        self._tap = tap

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._inner:
            self._tap.response += piece
            yield piece

    def close(self) -> None:
        self._inner.close()


@pytest.fixture
def url(request: pytest.FixtureRequest, way: str, gateway: Gateway) -> str:
    """The address for clients: the gateway's own, or that of the nginx in front of it."""
    if way == "nginx":
        return str(request.getfixturevalue("shared_nginx").url)
    return gateway.url


@pytest.fixture
def tap() -> Iterator[Wiretap]:
    tap = Wiretap()
    yield tap
    tap.close()


def call(url: str, tap: Wiretap, path: str, body: dict[str, Any], stream: bool) -> Any:
    """Send a body through the package of the path's dialect, and read the whole response."""
    http = httpx2.Client(transport=tap, timeout=60)
    client: Any
    if path == "/v1/messages":
        client = anthropic.Anthropic(base_url=url, api_key="x", http_client=http, max_retries=0)
        kind, event = anthropic.types.Message, anthropic.types.RawMessageStreamEvent
        streams: Any = anthropic.Stream[event]
        target = path
    else:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", http_client=http, max_retries=0)
        kind, event, target = _openai_types(path), _openai_types(path, True), path[3:]
        streams = openai.Stream[event]
    if not stream:
        return client.post(target, body=body, cast_to=kind)
    return list(client.post(target, body=body, cast_to=event, stream=True, stream_cls=streams))


def _openai_types(path: str, stream: bool = False) -> Any:
    types = openai.types
    return {
        "/v1/chat/completions": [types.chat.ChatCompletion, types.chat.ChatCompletionChunk],
        "/v1/completions": [types.Completion, types.Completion],
        "/v1/responses": [types.responses.Response, types.responses.ResponseStreamEvent],
        "/v1/embeddings": [types.CreateEmbeddingResponse, None],
    }[path][stream]


def text_of(path: str, response: Any) -> str:
    """The text in a response, as the package parsed it."""
    if path == "/v1/chat/completions" and isinstance(response, list):
        return "".join(c.choices[0].delta.content or "" for c in response if c.choices)
    if path == "/v1/chat/completions":
        return str(response.choices[0].message.content)
    if path == "/v1/completions":
        chunks = response if isinstance(response, list) else [response]
        return "".join(c.choices[0].text for c in chunks if c.choices)
    if path == "/v1/responses" and isinstance(response, list):
        return "".join(e.delta for e in response if e.type == "response.output_text.delta")
    if path == "/v1/responses":
        return str(response.output_text)
    if isinstance(response, list):
        return "".join(e.delta.text for e in response if e.type == "content_block_delta")
    return str(response.content[0].text)


def without_usage(sent: bytes) -> bytes:
    """A stream's bytes without its single usage chunk."""
    events = sent.split(b"\n\n")
    usage = [event for event in events if b'"choices":[]' in event and b'"usage":{' in event]
    assert len(usage) == 1
    events.remove(usage[0])
    return b"\n\n".join(events)


def members(content: bytes) -> list[tuple[str, Any]]:
    """The members of a JSON object in their order, numbers as their text."""
    text = content.decode()
    pairs: list[tuple[str, Any]] = json.JSONDecoder(
        object_pairs_hook=list, parse_int=lambda n: f"<{n}>", parse_float=lambda n: f"<{n}>"
    ).decode(text)
    return pairs


@pytest.mark.parametrize(("endpoint", "stream"), FORMS)
def test_with_nothing_to_inject_every_byte_is_unchanged(
    url: str, simulator: Simulator, tap: Wiretap, endpoint: Endpoint, stream: bool
) -> None:
    model = LLM if endpoint.streams else EMBEDDING
    body = {"model": model, **endpoint.body, **endpoint.needed, **HARD}
    if stream:
        body["stream"] = True
        if endpoint.usage_on_request:
            body["stream_options"] = {"include_usage": True}
    response = call(url, tap, endpoint.path, body, stream)
    record = simulator.last_request()
    assert (record["method"], record["target"]) == ("POST", endpoint.path)
    assert record["body"] == tap.request
    assert tap.response == record["sent"]
    if endpoint.streams:
        assert text_of(endpoint.path, response) == TEXT
    else:
        assert len(response.data) == 2


@pytest.mark.parametrize(("endpoint", "stream"), FORMS)
def test_injecting_everything_changes_nothing_else(
    url: str,
    gateway: Gateway,
    simulator: Simulator,
    tap: Wiretap,
    endpoint: Endpoint,
    stream: bool,
) -> None:
    model = LLM if endpoint.streams else EMBEDDING
    active = {"modelKey": model, "defaultInference": {**DEFAULTS, "stream": stream}}
    assert gateway.post("/admin/models/activate", active).status_code == 200
    response = call(url, tap, endpoint.path, {**endpoint.body, **HARD}, stream)
    record = simulator.last_request()
    injected = {"model": model, **endpoint.members}
    if endpoint.streams:
        injected["stream"] = stream
    if stream and endpoint.usage_on_request:
        injected["stream_options"] = {"include_usage": True}
    received, given = members(record["body"]), members(tap.request)
    assert json.loads(record["body"]) == {
        **json.loads(tap.request),
        **injected,
    }
    assert [pair for pair in received if pair[0] not in injected] == given
    assert len({name for name, _ in received}) == len(received)
    removes_usage = stream and endpoint.usage_on_request
    assert tap.response == (without_usage(record["sent"]) if removes_usage else record["sent"])
    if endpoint.streams:
        assert text_of(endpoint.path, response) == "1 2 3 4 "


@pytest.mark.parametrize("endpoint", ENDPOINTS[:2], ids=lambda one: one.path[4:])
def test_only_the_usage_chunk_is_requested_and_removed(
    url: str, simulator: Simulator, tap: Wiretap, endpoint: Endpoint
) -> None:
    body = {"model": LLM, **endpoint.body, **HARD, "stream": True}
    response = call(url, tap, endpoint.path, body, True)
    record = simulator.last_request()
    usage = [("stream_options", [("include_usage", True)])]
    received = members(record["body"])
    assert [pair for pair in received if pair not in usage] == members(tap.request)
    assert [pair for pair in received if pair in usage] == usage
    assert tap.response == without_usage(record["sent"])
    assert text_of(endpoint.path, response) == TEXT
