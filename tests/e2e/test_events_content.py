"""What each event holds: the contract's members, the right numbers, and nothing confidential."""

from __future__ import annotations

import json
import re
import socket
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import EventReader
from tests.processes import Gateway, Simulator, eventually

MODEL = "qwen2-1.5b-instruct"
EMBEDDING = "text-embedding-nomic-embed-text-v1.5"
KEY, ADMIN_KEY = "MARKER-inference-key-0123456789", "MARKER-admin-key-0123456789"
INFERENCE = {"Authorization": f"Bearer {KEY}"}
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
PROMPT = "MARKER-prompt count to 7"
#: The simulator's answer to that.
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
    """A gateway with the keys ``alice`` and (for all but inference) ``root``."""
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
    """Ask under a request id of its own; returns the answer and the id."""
    told = {**INFERENCE, "X-Request-Id": uuid.uuid4().hex, **headers}
    answer = keyed.post(path, body, headers=told)
    assert answer.headers["X-Request-Id"] == told["X-Request-Id"]
    return answer


def ended(reader: EventReader, answer: Any) -> dict[str, Any]:
    request_id = answer.headers["X-Request-Id"]
    data: dict[str, Any] = reader.until("inference_complete", requestId=request_id)
    return data


def leave_in_the_middle(keyed: Gateway, request_id: str) -> None:
    """Begin to read a stream and go away."""
    body = json.dumps(chat(stream=True)).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: gateway", f"Content-Length: {len(body)}"]
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
    """One of each: loads and unloads, right and wrong, exchanges that end well, badly, early."""
    load = {"modelKey": MODEL, "instanceId": "mine", "loadConfig": {"contextLength": 2048}}
    assert keyed.post("/admin/models/load", load, headers=ADMIN).status_code == 200
    assert keyed.post("/admin/models/load", load, headers=ADMIN).status_code == 409
    unknown = keyed.post("/admin/models/load", {"modelKey": "unknown"}, headers=ADMIN)
    assert unknown.status_code == 404
    assert ask(keyed, {"messages": chat()["messages"]}).status_code == 200
    assert ask(keyed, chat(stream=True), "/chat/completions").status_code == 200
    spoiled = ask(keyed, chat(), **{"X-Simulator-Fault": "refuse-500"})
    assert spoiled.status_code == 500
    assert ended(reader, ask(keyed, chat(stop=["MARKER-stop"])))["status"] == 200
    unreadable = keyed.http.post(
        f"{keyed.url}/v1/chat/completions",
        data='{"messages": [{"content": "MARKER',
        timeout=20,
        headers={**INFERENCE, "Content-Type": "application/json"},
    )
    assert unreadable.status_code == 400
    broken = ask(keyed, chat(stream=True), **{"X-Simulator-Fault": "close-before-head"})
    assert ended(reader, broken)["status"] == 502
    listed = keyed.get("/v1/models?key=MARKER-query", headers=INFERENCE)
    ended(reader, listed)
    left = uuid.uuid4().hex
    leave_in_the_middle(keyed, left)
    reader.until("inference_complete", requestId=left)
    assert keyed.post("/admin/models/unload", {"instanceId": "mine"}, headers=ADMIN).ok
    activate = {"modelKey": MODEL, "defaultInference": {"topK": 3}}
    assert keyed.post("/admin/models/activate", activate, headers=ADMIN).ok
    assert keyed.post("/admin/models/deactivate", headers=ADMIN).ok
    reader.until("model_deactivate", modelKey=MODEL, instanceId=None)


def test_every_event_has_the_contracts_members_and_nothing_confidential(
    keyed: Gateway, reader: EventReader
) -> None:
    do_everything(keyed, reader)
    assert {frame.event for frame in reader.frames} == MEMBERS.keys() | {"error"}
    differing = set()
    for frame in reader.frames:
        members = frame.data.keys() - {"timestamp"}
        if frame.event == "error":
            needed, possible = {"operation", "error"}, {"requestId", "totalTimeMs"}
            fits = needed <= members <= needed | possible
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


def test_a_load_tells_its_progress(keyed: Gateway, reader: EventReader) -> None:
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
    assert not reader.of("model_activate")


def test_an_exchange_tells_who_asked_what_for_which_model(
    keyed: Gateway, reader: EventReader
) -> None:
    activate = {"modelKey": MODEL, "instanceId": "mine"}
    assert keyed.post("/admin/models/load", activate, headers=ADMIN).ok
    answer = ask(keyed, {"messages": chat()["messages"], "stream": True}, "/chat/completions")
    request_id = answer.headers["X-Request-Id"]
    complete = ended(reader, answer)
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


def test_a_client_that_leaves_is_a_499_and_no_error(keyed: Gateway, reader: EventReader) -> None:
    left = uuid.uuid4().hex
    leave_in_the_middle(keyed, left)
    complete = reader.until("inference_complete", requestId=left)
    assert (complete["status"], complete["cancelled"]) == (499, True)
    assert not reader.of("error")


@pytest.mark.parametrize(
    ("fault", "status"), [("refuse-500", 500), ("break-stream", 200), ("close-before-head", 502)]
)
def test_a_failed_exchange_tells_an_error_and_then_its_end(
    keyed: Gateway, reader: EventReader, fault: str, status: int
) -> None:
    headers = {**INFERENCE, "X-Simulator-Fault": fault}
    with keyed.post("/v1/chat/completions", chat(stream=True), headers=headers, stream=True) as one:
        request_id = one.headers["X-Request-Id"]
        complete = reader.until("inference_complete", requestId=request_id)
    assert (complete["status"], complete["cancelled"]) == (status, False)
    told = [f for f in reader.frames if f.data.get("requestId") == request_id]
    assert [f.event for f in told] == ["inference_start", "error", "inference_complete"]
    assert told[1].data["operation"] == "inference"
    assert told[1].data["error"]


_BODIES: dict[str, Any] = {
    "chat/completions": {"messages": [{"role": "user", "content": "count to 5"}]},
    "completions": {"prompt": "count to 5"},
    "responses": {"input": "count to 5"},
    "messages": {"messages": [{"role": "user", "content": "count to 5"}], "max_tokens": 50},
}


def usage_told(text: str) -> dict[str, int]:
    """What LM Studio's answer said, the last of each number."""
    found: dict[str, int] = {}
    for name, number in re.findall(r'"(\w+)_tokens": ?(\d+)', text):
        found[{"input": "prompt", "output": "completion"}.get(name, name)] = int(number)
    return found


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("endpoint", _BODIES)
def test_tokens_are_as_lm_studio_counted_them(
    keyed: Gateway, simulator: Simulator, reader: EventReader, endpoint: str, stream: bool
) -> None:
    body = {"model": MODEL, "stream": stream, **_BODIES[endpoint]}
    complete = ended(reader, ask(keyed, body, f"/v1/{endpoint}"))
    eventually(lambda: simulator.last_request()["outcome"] != "running")
    told = usage_told(simulator.last_request()["sent"].decode())
    assert told["completion"] == 5
    assert told["prompt"] > 0
    assert complete["tokenUsage"] == {
        "promptTokens": told["prompt"],
        "completionTokens": 5,
        "totalTokens": told["prompt"] + 5,
    }


def test_tokens_of_embeddings_are_counted(
    keyed: Gateway, simulator: Simulator, reader: EventReader
) -> None:
    body = {"model": EMBEDDING, "input": "some words to embed"}
    complete = ended(reader, ask(keyed, body, "/v1/embeddings"))
    told = usage_told(simulator.last_request()["sent"].decode())
    assert told["prompt"] > 0
    assert complete["tokenUsage"]["promptTokens"] == told["prompt"]
    assert complete["tokenUsage"]["totalTokens"] == told["total"]
