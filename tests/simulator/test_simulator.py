"""The simulator, used through the real SDK and the real OpenAI and Anthropic clients."""

from __future__ import annotations

import base64
import hashlib
import json
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import anthropic
import httpx
import lmstudio
import openai
import pytest
from lmstudio.json_api import LoadModelEndpoint

from tests.processes import eventually, eventually_equal

TOKEN = "sk-lm-AbCdEf12:0123456789abcdefghij"
LLM = "qwen2-1.5b-instruct"
EMBEDDING = "text-embedding-nomic-embed-text-v1.5"
SLOW_LLM = "llama-3.3-70b-instruct"
TOOL_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
UPGRADE = (
    b"GET /llm HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


class Running:
    """A simulator in its own process, with a method for each control path."""

    def __init__(self, *options: str, verify: ssl.SSLContext | bool = True) -> None:
        command = [sys.executable, "-m", "gateway.simulator", "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url = self.line.split()[-1]
        self.host = self.url.partition("://")[2]
        self.port = int(self.url.rpartition(":")[2])
        self.http = httpx.Client(base_url=self.url, verify=verify, timeout=10, trust_env=False)

    def stop(self) -> int:
        self.http.close()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stdout is not None
        with self.process.stdout:
            return self.process.wait(10)

    def state(self) -> dict[str, Any]:
        response: dict[str, Any] = self.http.get("/_simulator/state").json()
        return response

    def faults(self, **switches: Any) -> None:
        assert self.http.post("/_simulator/faults", json=switches).status_code == 200

    def requests(self) -> list[dict[str, Any]]:
        response: list[dict[str, Any]] = self.http.get("/_simulator/requests").json()["requests"]
        return response

    def outcomes(self) -> list[str]:
        """How the requests ended, which is recorded a moment after the response's last byte."""
        return [record["outcome"] for record in self.requests()]

    def ask(self, text: str = "count to 5", stream: bool = False, **headers: str) -> httpx.Response:
        """Ask for a chat completion; ``fault="gzip"`` is the header ``X-Simulator-Fault: gzip``."""
        knobs = {f"X-Simulator-{name.replace('_', '-')}": value for name, value in headers.items()}
        return self.http.post("/v1/chat/completions", json=chat(text, stream), headers=knobs)

    def openai(self, token: str = "any") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0)


def chat(text: str, stream: bool = False) -> dict[str, Any]:
    return {"model": LLM, "messages": [{"role": "user", "content": text}], "stream": stream}


def raw_request(port: int, body: dict[str, Any], *headers: str) -> socket.socket:
    content = json.dumps(body).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Content-Length: {len(content)}"]
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall("\r\n".join([*lines, *headers, "", ""]).encode() + content)
    return connection


def text_frame(message: dict[str, Any]) -> bytes:
    """Return a short JSON message as a client's WebSocket frame, masked with zeros."""
    text = json.dumps(message).encode()
    return struct.pack("!BBI", 0x81, 0x80 | len(text), 0) + text


def read_all(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


class Client(lmstudio.Client):
    """The SDK's client with an API token, as its 1.5.0 has no argument for one."""

    token: ClassVar[tuple[str, str]] = ("guest:x", "y")

    def _create_auth_message(self) -> dict[str, Any]:
        return dict(self._format_auth_message(*self.token))


class TokenClient(Client):
    token = ("AbCdEf12", "0123456789abcdefghij")


class Raw:
    """An RPC parameter that the SDK sends unchanged."""

    def __init__(self, content: Any) -> None:
        self._content = content

    def to_dict(self) -> Any:
        return self._content


def raw_load(session: Any, *fields: tuple[str, Any], key: str = LLM, **more: Any) -> Any:
    """Open a load channel with raw KV fields and pass the channel to ``more["run"]``."""
    endpoint = LoadModelEndpoint(
        key, more.get("identifier"), more.get("ttl"), session._API_TYPES.REQUEST_NEW_INSTANCE,
        session._API_TYPES.MODEL_LOAD_CONFIG, None, more.get("progress"),
    )  # fmt: skip
    stack: Any = endpoint.creation_params["loadConfigStack"]
    stack["layers"][0]["config"]["fields"] += [{"key": k, "value": v} for k, v in fields]
    with session._create_channel(endpoint) as channel:
        return more.get("run", lambda channel: channel.wait_for_result())(channel)


@pytest.fixture(scope="module")
def process() -> Iterator[Running]:
    running = Running("--pace-ms", "1")
    yield running
    assert running.stop() == 0


@pytest.fixture
def simulator(process: Running) -> Running:
    process.http.post("/_simulator/reset")
    return process


@pytest.fixture
def sdk(simulator: Running) -> Iterator[Client]:
    lmstudio.set_sync_api_timeout(10)
    with Client(simulator.host) as client:
        yield client


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    running = Running("--token", TOKEN, "--pace-ms", "1")
    yield running
    assert running.stop() == 0


def refusal(call: Callable[[], object]) -> Any:
    with pytest.raises(lmstudio.LMStudioServerError) as caught:
        call()
    return caught.value.server_error


# -- the SDK


def test_it_prints_its_url(simulator: Running) -> None:
    assert simulator.line == f"LM Studio simulator listening on {simulator.url}\n"
    assert simulator.http.get("/lmstudio-greeting").json() == {"lmstudio": True}


def test_the_sdk_lists_models_of_both_kinds(sdk: Client) -> None:
    assert LLM in [model.model_key for model in sdk.llm.list_downloaded()]
    assert [model.model_key for model in sdk.embedding.list_downloaded()] == [EMBEDDING]
    assert sdk.list_loaded_models() == []


def test_a_load_reports_progress_and_applies_its_settings(sdk: Client) -> None:
    reported: list[float] = []
    config: Any = {"contextLength": 1024, "ropeFrequencyBase": 1000.0, "gpu": {"ratio": 0.5}}
    model = sdk.llm.load_new_instance(LLM, "mine", config=config, on_load_progress=reported.append)
    assert reported == sorted(reported)
    assert reported[-1] == 1
    applied = model.get_load_config().to_dict()
    assert applied["contextLength"] == 1024
    assert applied["ropeFrequencyBase"] == 1000.0
    assert applied["gpu"]["ratio"] == 0.5  # type: ignore[index]
    assert model.get_context_length() == 1024
    assert [one.identifier for one in sdk.llm.list_loaded()] == ["mine"]
    model.unload()
    assert sdk.llm.list_loaded() == []


def test_embedding_models_have_their_own_setting_keys(sdk: Client, simulator: Running) -> None:
    config: Any = {"contextLength": 512, "gpu": {"ratio": 0.25}}
    model = sdk.embedding.load_new_instance(EMBEDDING, config=config)
    (loaded,) = simulator.state()["loaded"]
    assert loaded["config"]["embedding.load.contextLength"] == 512
    assert loaded["config"]["embedding.load.llama.acceleration.offloadRatio"] == 0.25
    assert loaded["ignored"] == {}
    assert model.get_context_length() == 512


def test_unknown_and_malformed_settings_are_silently_ignored(
    sdk: Client, simulator: Running
) -> None:
    good = ("llm.load.llama.cpuThreadPoolSize", 6)
    bare, unknown = ("llm.load.llama.ropeFrequencyBase", 1000.0), ("llm.load.gpuLayers", 12)
    raw_load(sdk.llm, good, bare, unknown)
    (loaded,) = simulator.state()["loaded"]
    assert loaded["ignored"] == dict([bare, unknown])
    assert loaded["config"][good[0]] == 6
    assert loaded["config"][bare[0]] == {"checked": False, "value": 0}
    assert simulator.state()["loads"][0]["fields"] == dict([good, bare, unknown])


def test_instances_are_named_after_their_key(sdk: Client) -> None:
    names = [sdk.llm.load_new_instance(LLM).identifier for _ in range(3)]
    assert names == [LLM, f"{LLM}:2", f"{LLM}:3"]


def test_rejected_loads_have_lm_studios_codes(sdk: Client) -> None:
    load = sdk.llm.load_new_instance
    assert refusal(lambda: load("nothing")).display_data["code"] == "generic.pathNotFound"
    assert refusal(lambda: load(EMBEDDING)).display_data["code"] == "generic.domainMismatch"
    load(LLM, "taken")
    in_use = refusal(lambda: load(LLM, "taken"))
    assert "already exists" in in_use.title
    assert in_use.display_data is None
    assert "insufficient memory" in refusal(lambda: load("deepseek-r1-671b")).cause


def test_an_instance_that_is_not_loaded_is_an_error(sdk: Client) -> None:
    unloaded = refusal(lambda: sdk.llm.unload("nothing"))
    assert unloaded.display_data["code"] == "generic.identifierNotFound"
    with pytest.raises(lmstudio.LMStudioModelNotFoundError):
        sdk.llm.get_model_info("nothing")


def test_an_idle_instance_expires(sdk: Client) -> None:
    sdk.llm.load_new_instance(LLM, "for ever", ttl=None)
    sdk.llm.load_new_instance(LLM, "brief", ttl=1)
    eventually(lambda: [one.identifier for one in sdk.llm.list_loaded()] == ["for ever"])


def test_a_cancelled_load_leaves_nothing_loaded(sdk: Client, simulator: Running) -> None:
    def cancel(channel: Any) -> None:
        stream = channel.rx_stream()
        assert next(stream)["type"] == "resolved"
        channel.cancel()
        for _ in stream:
            pass

    error = refusal(lambda: raw_load(sdk.llm, key=SLOW_LLM, run=cancel))
    assert error.cause == "Operation canceled."
    (attempt,) = simulator.state()["loads"]
    assert attempt["outcome"] == "cancelled"
    assert sdk.llm.list_loaded() == []


def test_a_closed_socket_cancels_its_load(simulator: Running) -> None:
    started = threading.Event()

    def load(client: Client) -> None:
        with pytest.raises(lmstudio.LMStudioError):
            raw_load(client.llm, key=SLOW_LLM, progress=lambda progress: started.set())

    with Client(simulator.host) as client:
        thread = threading.Thread(target=load, args=[client])
        thread.start()
        assert started.wait(10)
        simulator.faults(drop_sockets=True)
        thread.join(10)
    eventually(lambda: simulator.state()["loads"][0]["outcome"] == "cancelled")
    assert simulator.state()["loaded"] == []


def test_a_violation_is_only_warned_about(sdk: Client, simulator: Running) -> None:
    lmstudio.set_sync_api_timeout(0.3)
    for endpoint, parameter in [("noSuchThing", None), ("unloadModel", Raw({"wrong": 1}))]:
        with pytest.raises(lmstudio.LMStudioTimeoutError):
            sdk.llm.remote_call(endpoint, parameter)  # type: ignore[arg-type]
    with pytest.raises(lmstudio.LMStudioTimeoutError):
        raw_load(sdk.llm, ttl=0)
    eventually_equal(lambda: len(simulator.state()["warnings"]), 3)
    assert simulator.state()["loads"] == []


def test_a_token_is_required(guarded: Running) -> None:
    # the SDK fails to parse the error: it raises ValueError instead of an error of its own
    with Client(guarded.host) as anonymous, pytest.raises(ValueError, match="dictionary update"):
        anonymous.llm.list_loaded()
    with TokenClient(guarded.host) as authorized:
        assert authorized.llm.list_loaded() == []
    assert guarded.state()["clients"] == ["AbCdEf12"]
    with pytest.raises(openai.AuthenticationError) as caught:
        guarded.openai("sk-wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    assert guarded.openai(TOKEN).models.list().data


def test_socket_faults(simulator: Running) -> None:
    simulator.faults(refuse_websockets=True)
    with Client(simulator.host) as client, pytest.raises(lmstudio.LMStudioWebsocketError):
        client.llm.list_loaded()
    simulator.faults(refuse_websockets=False, unknown_model_type=True, load_ms=100)
    with Client(simulator.host) as client:
        downloaded = client.system.remote_call("listDownloadedModels")
        assert {"reranker"} < {model["type"] for model in downloaded}
        eventually_equal(lambda: simulator.state()["sockets"], {"system": 1})
        simulator.faults(fail_loads="no luck")
        assert refusal(lambda: client.llm.load_new_instance(LLM)).cause == "no luck"
    assert simulator.http.post("/_simulator/faults", json={"typo": True}).status_code == 400


def test_a_silent_simulator_accepts_a_socket_and_sends_nothing(simulator: Running) -> None:
    simulator.faults(silent_after_upgrade=True)
    with socket.create_connection(("127.0.0.1", simulator.port), timeout=10) as connection:
        connection.sendall(UPGRADE + text_frame({"authVersion": 1, "clientIdentifier": "a"}))
        received = b""
        while b"\r\n\r\n" not in received:
            received += connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 101 ")
        assert received.endswith(b"\r\n\r\n")
        eventually_equal(lambda: simulator.state()["sockets"], {"llm": 1})
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    eventually_equal(lambda: simulator.state()["sockets"], {})


def test_a_reset_cancels_a_load(sdk: Client, simulator: Running) -> None:
    def reset(channel: Any) -> None:
        for message in channel.rx_stream():
            if message["type"] == "resolved":
                simulator.http.post("/_simulator/reset")

    error = refusal(lambda: raw_load(sdk.llm, key=SLOW_LLM, run=reset))
    assert error.cause == "Operation canceled."
    assert simulator.state()["loaded"] == simulator.state()["loads"] == []


# -- OpenAI and Anthropic clients


def test_chat_is_parsed_by_the_openai_client(simulator: Running) -> None:
    client = simulator.openai()
    plain = client.chat.completions.create(**{**chat("count to 3"), "stream": False})
    assert plain.choices[0].message.content == "1 2 3 "
    assert plain.usage is not None
    assert (plain.usage.prompt_tokens, plain.usage.completion_tokens) == (3, 3)
    asked: Any = chat("count to 5", stream=True)
    usage: Any = {"include_usage": True}
    asked |= {"max_tokens": 2, "stream_options": usage}
    chunks: Any = list(client.chat.completions.create(**asked))
    assert [one.choices[0].delta.content for one in chunks[:-1]] == ["1 ", "2 ", None]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 5


def test_completions_and_embeddings_are_parsed(simulator: Running) -> None:
    client = simulator.openai()
    assert client.completions.create(model=LLM, prompt="count to 2").choices[0].text == "1 2 "
    pieces = client.completions.create(model=LLM, prompt="count to 2", stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "1 2 "
    packed = client.embeddings.create(model=EMBEDDING, input=["a", "b"])
    plain = client.embeddings.create(model=EMBEDDING, input="a", encoding_format="float")
    assert len(packed.data) == 2
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding)
    assert len(plain.data[0].embedding) == 8


def test_responses_are_parsed(simulator: Running) -> None:
    client = simulator.openai()
    assert client.responses.create(model=LLM, input="count to 2").output_text == "1 2 "
    with client.responses.stream(model=LLM, input="count to 4", max_output_tokens=2) as stream:
        kinds = [event.type for event in stream]
    assert kinds.count("response.output_text.delta") == 2
    assert kinds[-1] == "response.incomplete"


def test_messages_are_parsed_by_the_anthropic_client(simulator: Running) -> None:
    client = anthropic.Anthropic(base_url=simulator.url, api_key="any", max_retries=0)
    asked: Any = {"model": LLM, "messages": [{"role": "user", "content": "count to 3"}]}
    plain = client.messages.create(**asked, max_tokens=2)
    assert plain.content[0].text == "1 2 "
    assert plain.stop_reason == "max_tokens"
    with client.messages.stream(**asked, max_tokens=9) as stream:
        final = stream.get_final_message()
    assert final.content[0].text == "1 2 3 "  # type: ignore[union-attr]
    assert (final.usage.input_tokens, final.usage.output_tokens) == (3, 3)


def test_tools_are_called_in_every_dialect(simulator: Running) -> None:
    client = simulator.openai()
    function = {"name": "weather", "parameters": TOOL_SCHEMA}
    tools: Any = [{"type": "function", "function": function}]
    asked: Any = chat("go")
    del asked["stream"]
    plain = client.chat.completions.create(**asked, tools=tools, tool_choice="required")
    assert plain.choices[0].finish_reason == "tool_calls"
    asked["messages"][0]["content"] = "please use the tool"
    with client.chat.completions.stream(**asked, tools=tools) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"city": "simulated"}
    flat: Any = [{"type": "function", **function}]
    (item,) = client.responses.create(model=LLM, input="use the tool", tools=flat).output
    assert item.type == "function_call"
    claude = anthropic.Anthropic(base_url=simulator.url, api_key="any", max_retries=0)
    tools = [{"name": "weather", "input_schema": TOOL_SCHEMA}]
    with claude.messages.stream(**asked, max_tokens=9, tools=tools) as streamed:
        assert streamed.get_final_message().stop_reason == "tool_use"


# -- LM Studio's HTTP API


def test_a_model_is_found_by_identifier_key_or_alone(simulator: Running, sdk: Client) -> None:
    refused = simulator.http.post("/v1/chat/completions", json={"messages": []})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith("No models loaded.")
    sdk.llm.load_new_instance(LLM, "mine")
    for name in ("mine", LLM, None):
        content = chat("hi") | {"model": name}
        response = simulator.http.post("/v1/chat/completions", json=content)
        assert response.json()["model"] == "mine"
    unknown = simulator.http.post("/v1/chat/completions", json=chat("hi") | {"model": "x"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (400, "model_not_found")
    assert simulator.openai().models.retrieve("publisher/model-with-slash")
    assert simulator.requests()[-1]["target"] == "/v1/models/publisher%2Fmodel-with-slash"


def test_errors_that_lm_studio_answers_with_200(simulator: Running, sdk: Client) -> None:
    files = {"file": ("speech.wav", b"\0" * (2 << 20))}
    unexpected = simulator.http.post("/v1/audio/transcriptions", files=files)
    assert unexpected.status_code == 200
    assert unexpected.json() == {
        "error": "Unexpected endpoint or method. (POST /v1/audio/transcriptions)"
    }
    record = simulator.requests()[-1]
    assert record["body"] == ""
    assert record["bodyLength"] > 2 << 20
    sdk.llm.load_new_instance(LLM, config={"contextLength": 4})
    overflow = simulator.ask("one two three four five")
    assert overflow.status_code == 200
    assert "context length" in overflow.json()["error"]
    malformed = simulator.http.post("/v1/chat/completions", content=b"{")
    assert malformed.status_code == 400


@pytest.mark.parametrize("options", [[], ["include_usage"], "include_usage", 1, {}])
def test_malformed_stream_options_ask_for_no_usage(simulator: Running, options: Any) -> None:
    asked = chat("count to 2", stream=True) | {"stream_options": options}
    response = simulator.http.post("/v1/chat/completions", json=asked)
    assert (response.status_code, response.text.count("data: ")) == (200, 4)


@pytest.mark.parametrize(
    "odd", [{"tools": [1], "tool_choice": "required"}, {"tools": {"a": 1}, "tool_choice": {}}]
)
def test_a_malformed_body_is_an_error_object(simulator: Running, odd: dict[str, Any]) -> None:
    response = simulator.http.post("/v1/chat/completions", json=chat("go") | odd)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_lone_surrogate_comes_back_unchanged(simulator: Running) -> None:
    asked = json.dumps(chat("hi") | {"model": "half \ud83d"}).encode()
    response = simulator.http.post("/v1/chat/completions", content=asked)
    assert response.status_code == 400
    assert "half \ud83d" in response.json()["error"]["message"]
    embedded = json.dumps({"model": EMBEDDING, "input": "\ud83d"}).encode()
    assert simulator.http.post("/v1/embeddings", content=embedded).status_code == 200


def test_a_request_is_recorded_as_it_was_sent(simulator: Running) -> None:
    body = json.dumps(chat("count to 2", stream=True)).encode()
    response = simulator.http.post(
        "/v1/chat/completions?a=%20b", content=iter([body]), headers={"X-Odd": "1"}
    )
    eventually_equal(simulator.outcomes, ["complete"])
    (record,) = simulator.requests()
    assert record["target"] == "/v1/chat/completions?a=%20b"
    assert ["X-Odd", "1"] in record["headers"]
    assert base64.b64decode(record["body"]) == body
    assert record["bodySha256"] == hashlib.sha256(body).hexdigest()
    assert record["status"] == 200
    assert base64.b64decode(record["sent"]) == response.content
    assert simulator.http.get(f"/_simulator/requests?since={record['id']}").json()["requests"] == []


@pytest.mark.parametrize(
    ("stream", "knob"), [(True, "Pace-Ms"), (False, "Pace-Ms"), (True, "Prefill-Ms")]
)
def test_a_client_that_disconnects_is_noticed(simulator: Running, stream: bool, knob: str) -> None:
    asked = chat("count to 100", stream)
    connection = raw_request(simulator.port, asked, f"X-Simulator-{knob}: 60000")
    eventually(simulator.requests)
    connection.close()
    eventually_equal(simulator.outcomes, ["client_gone"])


# -- faults of one request


def test_a_response_can_be_replaced_by_an_error(simulator: Running) -> None:
    html = simulator.ask(fault="refuse-500")
    assert (html.status_code, html.text[:6]) == (500, "<html>")
    assert isinstance(simulator.ask(fault="error-string-500").json()["error"], str)
    assert simulator.ask(fault="status-429").status_code == 429
    hidden = simulator.ask(stream=True, fault="error-200-stream")
    assert (hidden.status_code, hidden.headers["content-type"][:16]) == (200, "application/json")
    assert isinstance(simulator.ask(fault="error-200").json()["error"], str)
    assert simulator.ask(fault="error-200-object").json()["error"]["message"]
    eventually_equal(simulator.outcomes, ["fault"] * 6)
    assert simulator.ask(fault="no-such-fault").status_code == 400


@pytest.mark.parametrize(
    ("fault", "stream"),
    [
        ("close-before-head", False), ("garbage-head", False), ("break-plain", False),
        ("break-stream", True),
    ],
)  # fmt: skip
def test_a_response_can_break_off(simulator: Running, fault: str, stream: bool) -> None:
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        simulator.ask(stream=stream, fault=fault)
    eventually_equal(simulator.outcomes, ["fault"])


def test_a_stream_can_end_in_an_error_or_fall_silent(simulator: Running) -> None:
    by_event = simulator.ask(stream=True, fault="error-in-stream-event").text
    assert '\n\nevent: error\ndata: {"error": {"message"' in by_event
    by_data = simulator.ask(stream=True, fault="error-in-stream-data").text
    assert by_data.count("data: ") == 4
    assert "[DONE]" not in by_event + by_data
    quiet = raw_request(
        simulator.port, chat("count to 9", True), "X-Simulator-Fault: silent-stream"
    )
    with quiet:
        received = b""
        while received.count(b"data: ") < 3:
            received += quiet.recv(65536)
        quiet.settimeout(0.3)
        with pytest.raises(TimeoutError):
            quiet.recv(1)


def test_a_response_can_be_sent_in_odd_shapes(simulator: Running) -> None:
    def content(text: str) -> str:
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        return "".join(one["choices"][0]["delta"].get("content", "") for one in events)

    for fault in ("gzip", "split-bytes", "crlf", "one-chunk"):
        assert content(simulator.ask(stream=True, fault=fault).text) == "1 2 3 4 5 "
    assert "\r\n\r\n" in simulator.ask(stream=True, fault="crlf").text
    zipped = simulator.ask(fault="gzip")
    assert zipped.headers["content-encoding"] == "gzip"
    stored = base64.b64decode(simulator.requests()[-1]["sent"])
    assert zlib.decompress(stored, wbits=31) == zipped.content
    assert len(simulator.ask(fault="big-answer").json()["choices"][0]["message"]["content"]) > 5e6
    bare = simulator.ask(fault="no-length")
    assert "content-length" not in bare.headers
    assert bare.json()["choices"]


def test_a_connection_is_reused_and_closed_when_idle(
    simulator: Running,
) -> None:
    connection = raw_request(simulator.port, chat("count to 1"))
    connection.sendall(b"GET /lmstudio-greeting HTTP/1.1\r\nHost: x\r\n\r\n")
    assert read_all(connection).count(b"HTTP/1.1 200 OK\r\n") == 2


def test_silent_http_hangs_until_switched_off(simulator: Running) -> None:
    simulator.faults(silent_http=True)
    with socket.create_connection(("127.0.0.1", simulator.port), timeout=0.3) as connection:
        connection.sendall(b"GET /lmstudio-greeting HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(10)
        simulator.faults(silent_http=False)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"


# -- TLS


def test_tls_serves_wss_and_https(tmp_path: Path) -> None:
    authority = pytest.importorskip("trustme").CA()
    certificate = authority.issue_cert("127.0.0.1")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    certificate.cert_chain_pems[0].write_to_path(str(chain))
    certificate.private_key_pem.write_to_path(str(key))
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    running = Running("--tls-cert", str(chain), "--tls-key", str(key), verify=trust)
    try:
        assert running.url.startswith("https://")
        assert running.ask(stream=True).text.endswith("data: [DONE]\n\n")
        assert frames_over_tls(running.port, trust) == [{"success": True}, {"type": "keepAliveAck"}]
        with running.http.stream(
            "POST", "/v1/chat/completions", json=chat("count to 9", True),
            headers={"X-Simulator-Fault": "silent-stream"},
        ) as response:  # fmt: skip
            next(response.iter_bytes())
        eventually(lambda: running.requests()[-1]["outcome"] == "client_gone")
    finally:
        assert running.stop() == 0


def frames_over_tls(port: int, trust: ssl.SSLContext) -> list[Any]:
    """Authenticate on wss, send a keepAlive, and return the replies."""
    plain = socket.create_connection(("127.0.0.1", port), timeout=10)
    with trust.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
        connection.sendall(UPGRADE)
        reader = connection.makefile("rb")
        with reader:
            while reader.readline().strip():
                pass
            frames = []
            for message in ({"authVersion": 1, "clientIdentifier": "a"}, {"type": "keepAlive"}):
                connection.sendall(text_frame(message))
                length = reader.read(2)[1]
                frames.append(json.loads(reader.read(length)))
        return frames
