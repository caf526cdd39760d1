"""Every event has the members of the contract, with the right numbers and nothing confidential."""

from __future__ import annotations

import json
import re
import socket
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import EventReader
from tests.processes import Gateway, Simulator, eventually, eventually_equal

MODEL = "qwen2-1.5b-instruct"
EMBEDDING = "text-embedding-nomic-embed-text-v1.5"
KEY, ADMIN_KEY = "MARKER-inference-key-0123456789", "MARKER-admin-key-0123456789"
INFERENCE = {"Authorization": f"Bearer {KEY}"}
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
PROMPT = "MARKER-prompt count to 7"
#: How the simulator's response to the prompt begins.
COMPLETION = "1 2 3"
Listen = Callable[..., EventReader]

_NAMES = {"modelKey", "instanceId"}
MEMBERS = {
    "connected": {"message"},
    "model_load_start": _NAMES | {"loadConfig"},
    "model_load_progress": _NAMES | {"progress", "progressRaw"},
    "model_load_complete": _NAMES | {"activated", "totalTimeMs", "loadConfig"},
    "model_unload_start": _NAMES,
    "model_unload_complete": _NAMES | {"totalTimeMs"},
    "model_activate": _NAMES | {"defaultInference"},
    "model_deactivate": _NAMES | {"defaultInference"},
    "inference_start": {"requestId", "method", "path", "model", "stream", "client"},
    "inference_complete": {"requestId", "status", "totalTimeMs", "ttftMs", "tokenUsage"}
    | {"tokensPerSec", "cancelled"},
}
USAGE = {"promptTokens", "completionTokens", "totalTokens"}


@pytest.fixture(scope="module")
def keyed(
    state_url: str, shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway with the inference key ``alice`` and the admin key ``root``."""
    gateway = Gateway(
        tmp_path_factory.mktemp("keyed"),
        shared_simulator.url,
        STATE_URL=state_url,
        GATEWAY_API_KEY=f"alice:{KEY}",
        GATEWAY_ADMIN_KEY=f"root:{ADMIN_KEY}",
    )
    yield gateway
    gateway.stop()


@pytest.fixture
def reader(keyed: Gateway, simulator: Simulator, listen: Listen) -> EventReader:
    reader: EventReader = listen(keyed, **ADMIN)
    reader.until("connected")
    return reader


def chat(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], **more}


def ask(keyed: Gateway, body: Any, path: str = "/v1/chat/completions", **headers: str) -> Any:
    """Send a request under a unique request id and return the response."""
    sent = {**INFERENCE, "X-Request-Id": uuid.uuid4().hex, **headers}
    response = keyed.post(path, body, headers=sent)
    assert response.headers["X-Request-Id"] == sent["X-Request-Id"]
    return response


def completion(reader: EventReader, response: Any) -> dict[str, Any]:
    """Wait for the inference_complete event of a response and return its data."""
    request_id = response.headers["X-Request-Id"]
    data: dict[str, Any] = reader.until("inference_complete", requestId=request_id)
    return data


def disconnect_in_the_middle(keyed: Gateway, request_id: str) -> None:
    """Start to read a stream and disconnect."""
    body = json.dumps(chat(stream=True)).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        f"Content-Length: {len(body)}",
    ]
    lines += [f"X-Request-Id: {request_id}", f"Authorization: Bearer {KEY}"]
    lines += ["X-Simulator-Pace-Ms: 20000", "", ""]
    with socket.create_connection(("127.0.0.1", keyed.port), 20) as client:
        client.sendall("\r\n".join(lines).encode() + body)
        received = b""
        while b"data: " not in received:
            piece = client.recv(65536)
            assert piece
            received += piece


def do_everything(keyed: Gateway, reader: EventReader) -> None:
    """Load and unload, with and without success; let exchanges succeed, fail and be cancelled."""
    load = {"modelKey": MODEL, "instanceId": "mine", "loadConfig": {"contextLength": 2048}}
    assert keyed.post("/admin/models/load", load, headers=ADMIN).status_code == 200
    assert keyed.post("/admin/models/load", load, headers=ADMIN).status_code == 409
    unknown = keyed.post("/admin/models/load", {"modelKey": "unknown"}, headers=ADMIN)
    assert unknown.status_code == 404
    assert ask(keyed, {"messages": chat()["messages"]}).status_code == 200
    assert ask(keyed, chat(stream=True), "/chat/completions").status_code == 200
    failed = ask(keyed, chat(), **{"X-Simulator-Fault": "refuse-500"})
    assert failed.status_code == 500
    assert completion(reader, ask(keyed, chat(stop=["MARKER-stop"])))["status"] == 200
    malformed = keyed.http.post(
        f"{keyed.url}/v1/chat/completions",
        data='{"messages": [{"content": "MARKER',
        timeout=20,
        headers={**INFERENCE, "Content-Type": "application/json"},
    )
    assert malformed.status_code == 400
    broken = ask(keyed, chat(stream=True), **{"X-Simulator-Fault": "close-before-head"})
    assert completion(reader, broken)["status"] == 502
    listed = keyed.get("/v1/models?key=MARKER-query", headers=INFERENCE)
    completion(reader, listed)
    cancelled = uuid.uuid4().hex
    disconnect_in_the_middle(keyed, cancelled)
    reader.until("inference_complete", requestId=cancelled)
    assert keyed.post("/admin/models/unload", {"instanceId": "mine"}, headers=ADMIN).ok
    activate = {"modelKey": MODEL, "defaultInference": {"topK": 3}}
    assert keyed.post("/admin/models/activate", activate, headers=ADMIN).ok
    assert keyed.post("/admin/models/deactivate", headers=ADMIN).ok
    reader.until("model_deactivate", modelKey=MODEL, instanceId=None)


def types(reader: EventReader) -> set[str]:
    return {frame.event for frame in reader.frames}


def test_every_event_has_the_members_of_the_contract_and_nothing_confidential(
    keyed: Gateway, reader: EventReader
) -> None:
    do_everything(keyed, reader)
    # events of the other worker may arrive after the last one that the test has waited for
    eventually_equal(lambda: types(reader), MEMBERS.keys() | {"error"})
    differing = set()
    for frame in reader.frames:
        members = frame.data.keys() - {"timestamp"}
        if frame.event == "error":
            required, optional = {"operation", "error"}, {"requestId", "totalTimeMs"}
            fits = required <= members <= required | optional
        else:
            fits = members == MEMBERS[frame.event]
        if not fits:
            differing.add((frame.event, tuple(sorted(members))))
        if frame.event == "inference_complete":
            assert frame.data["tokenUsage"].keys() == USAGE
    raw = "".join(reader.raw)
    assert "MARKER" not in raw
    assert COMPLETION not in raw
    assert not differing


def test_a_load_publishes_its_progress(keyed: Gateway, reader: EventReader) -> None:
    config = {"contextLength": 2048, "gpu": {"ratio": 0.5}}
    load = {"modelKey": MODEL, "instanceId": "mine", "loadConfig": config, "activate": False}
    assert keyed.post("/admin/models/load", load, headers=ADMIN).status_code == 200
    complete = reader.until("model_load_complete")
    [start] = reader.of("model_load_start")
    names = {"modelKey": MODEL, "instanceId": "mine"}
    assert names.items() <= start.items()
    assert start["loadConfig"] == complete["loadConfig"] == config
    assert names.items() <= complete.items()
    assert complete["activated"] is False
    steps = reader.of("model_load_progress", **names)
    shares = [step["progressRaw"] for step in steps]
    assert len(shares) > 3
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
    assert [step["progress"] for step in steps] == [round(share * 100, 1) for share in shares]
    assert not reader.of("model_activate", instanceId="mine")


def test_an_exchange_publishes_its_client_path_and_model(
    keyed: Gateway, reader: EventReader
) -> None:
    activate = {"modelKey": MODEL, "instanceId": "mine"}
    assert keyed.post("/admin/models/load", activate, headers=ADMIN).ok
    response = ask(keyed, {"messages": chat()["messages"], "stream": True}, "/chat/completions")
    request_id = response.headers["X-Request-Id"]
    complete = completion(reader, response)
    [start] = reader.of("inference_start", requestId=request_id)
    del start["timestamp"]
    assert start == {
        "requestId": request_id,
        "method": "POST",
        "path": "/v1/chat/completions",
        "model": "mine",
        "stream": True,
        "client": "alice",
    }
    assert (complete["status"], complete["cancelled"]) == (200, False)
    assert 0 < complete["ttftMs"] <= complete["totalTimeMs"]
    assert complete["tokensPerSec"] > 0


def test_a_client_that_disconnects_is_a_499_and_not_an_error(
    keyed: Gateway, reader: EventReader
) -> None:
    request_id = uuid.uuid4().hex
    disconnect_in_the_middle(keyed, request_id)
    complete = reader.until("inference_complete", requestId=request_id)
    assert (complete["status"], complete["cancelled"]) == (499, True)
    assert not reader.of("error", requestId=request_id)


@pytest.mark.parametrize(
    ("fault", "status"), [("refuse-500", 500), ("break-stream", 200), ("close-before-head", 502)]
)
def test_a_failed_exchange_publishes_an_error_and_then_its_end(
    keyed: Gateway, reader: EventReader, fault: str, status: int
) -> None:
    headers = {**INFERENCE, "X-Simulator-Fault": fault}
    with keyed.post("/v1/chat/completions", chat(stream=True), headers=headers, stream=True) as one:
        request_id = one.headers["X-Request-Id"]
        complete = reader.until("inference_complete", requestId=request_id)
    assert (complete["status"], complete["cancelled"]) == (status, False)
    frames = [f for f in reader.frames if f.data.get("requestId") == request_id]
    assert [f.event for f in frames] == ["inference_start", "error", "inference_complete"]
    assert frames[1].data["operation"] == "inference"
    assert frames[1].data["error"]


_BODIES: dict[str, Any] = {
    "chat/completions": {"messages": [{"role": "user", "content": "count to 5"}]},
    "completions": {"prompt": "count to 5"},
    "responses": {"input": "count to 5"},
    "messages": {"messages": [{"role": "user", "content": "count to 5"}], "max_tokens": 50},
}


def reported_usage(text: str) -> dict[str, int]:
    """The token counts in a response of LM Studio; the last one of each kind."""
    found: dict[str, int] = {}
    for name, number in re.findall(r'"(\w+)_tokens": ?(\d+)', text):
        found[{"input": "prompt", "output": "completion"}.get(name, name)] = int(number)
    return found


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("endpoint", _BODIES)
def test_token_usage_is_that_of_lm_studio(
    keyed: Gateway, simulator: Simulator, reader: EventReader, endpoint: str, stream: bool
) -> None:
    body = {"model": MODEL, "stream": stream, **_BODIES[endpoint]}
    complete = completion(reader, ask(keyed, body, f"/v1/{endpoint}"))
    eventually(lambda: simulator.last_request()["outcome"] != "running")
    usage = reported_usage(simulator.last_request()["sent"].decode())
    assert usage["completion"] == 5
    assert usage["prompt"] > 0
    assert complete["tokenUsage"] == {
        "promptTokens": usage["prompt"],
        "completionTokens": 5,
        "totalTokens": usage["prompt"] + 5,
    }


def test_token_usage_of_embeddings_is_that_of_lm_studio(
    keyed: Gateway, simulator: Simulator, reader: EventReader
) -> None:
    body = {"model": EMBEDDING, "input": "some words to embed"}
    complete = completion(reader, ask(keyed, body, "/v1/embeddings"))
    usage = reported_usage(simulator.last_request()["sent"].decode())
    assert usage["prompt"] > 0
    assert complete["tokenUsage"]["promptTokens"] == usage["prompt"]
    assert complete["tokenUsage"]["totalTokens"] == usage["total"]
