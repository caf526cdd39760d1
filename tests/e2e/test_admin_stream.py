"""A streamed load: its events, and its cancellation when the client disconnects."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from tests.processes import Gateway, Simulator, eventually, eventually_equal

pytestmark = pytest.mark.both_servers

QWEN = "qwen2.5-7b-instruct"
SLOW = "llama-3.3-70b-instruct"
#: Milliseconds; such a load never ends before it is cancelled.
ENDLESS = 60_000
EVENTS = {"Accept": "text/event-stream"}


def stream(gateway: Gateway, **body: Any) -> Any:
    return gateway.post("/admin/models/load", body, headers=EVENTS, stream=True)


def events(response: Any) -> list[tuple[str, dict[str, Any]]]:
    """All events of a response, without comments; each must have exactly one data line."""
    found = []
    for block in response.content.decode().split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            name, data = lines
            assert name.startswith("event: ")
            found.append((name[7:], json.loads(data.removeprefix("data: "))))
    return found


def test_a_streamed_load_sends_its_progress_and_its_result(
    gateway: Gateway, simulator: Simulator
) -> None:
    with stream(gateway, modelKey=QWEN, instanceId="one") as response:
        assert response.status_code == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["X-Accel-Buffering"] == "no"
        assert response.headers["Cache-Control"] == "no-cache"
        *progress, (last, complete) = events(response)
    assert {name for name, _ in progress} == {"model_load_progress"}
    fractions = [data["progressRaw"] for _, data in progress]
    assert len(fractions) >= 10
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    for _, data in progress:
        assert data["progress"] == round(data["progressRaw"] * 100, 1)
        assert (data["modelKey"], data["instanceId"]) == (QWEN, "one")
    assert last == "model_load_complete"
    assert complete["status"] == "loaded"
    assert (complete["modelKey"], complete["instanceId"]) == (QWEN, "one")
    assert complete["activated"] is True
    assert complete["appliedConfig"]["contextLength"] == 4096
    assert complete["warnings"] == []
    assert [one["identifier"] for one in simulator.state()["loaded"]] == ["one"]


def test_progress_is_sent_while_the_model_loads(gateway: Gateway, simulator: Simulator) -> None:
    simulator.faults(load_ms=ENDLESS)
    with stream(gateway, modelKey=SLOW) as response:
        lines = response.iter_lines()
        assert next(lines) == b"event: model_load_progress"
        assert simulator.state()["loads"][0]["outcome"] == "loading"
    eventually(lambda: simulator.state()["loads"][0]["outcome"] == "cancelled")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"modelKey": "deepseek-r1-671b"}, 502, "insufficient memory"),
        ({"modelKey": "no-such-model"}, 404, "Model not found: no-such-model"),
        (
            {"modelKey": QWEN, "loadConfig": {"gpu": {"layers": 5}}},
            400,
            "Validation failed",
        ),
    ],
)
def test_a_failed_load_ends_in_an_error_event(
    gateway: Gateway, body: dict[str, Any], status: int, words: str
) -> None:
    with stream(gateway, **body) as response:
        assert response.status_code == 200
        request_id = response.headers["X-Request-Id"]
        name, error = events(response)[-1]
    assert name == "error"
    assert words in error["error"]
    assert (error["status"], error["requestId"]) == (status, request_id)


def test_an_error_event_has_the_details_of_a_validation(gateway: Gateway) -> None:
    with stream(gateway, modelKey=QWEN, loadConfig={"gpu": {"layers": 5}}) as response:
        error = events(response)[-1][1]
    assert error["details"][0]["path"] == ["loadConfig", "gpu", "layers"]


def test_an_invalid_body_is_rejected_before_the_stream_begins(gateway: Gateway) -> None:
    with stream(gateway, modelKey="") as response:
        assert response.status_code == 400
        assert response.json()["details"]


def slow_load(simulator: Simulator) -> dict[str, Any] | None:
    return next((load for load in simulator.state()["loads"] if load["modelKey"] == SLOW), None)


def start_and_disconnect(gateway: Gateway, simulator: Simulator, accept: str) -> None:
    """Start an endless load on a socket of its own, and close that once the load is in progress."""
    simulator.faults(load_ms=ENDLESS)
    body = json.dumps({"modelKey": SLOW}).encode()
    head = (
        f"POST /admin/models/load HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.port)) as client:
        client.sendall(head.encode() + body)
        eventually(lambda: (load := slow_load(simulator)) and load["progress"] > 0)
    simulator.faults(load_ms=0)


@pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
def test_a_client_that_disconnects_cancels_its_load(
    gateway: Gateway, simulator: Simulator, accept: str
) -> None:
    start_and_disconnect(gateway, simulator, accept)

    def outcome() -> Any:
        return simulator.state()["loads"][0]["outcome"]

    assert eventually(lambda: outcome() != "loading" and outcome()) == "cancelled"
    assert gateway.get("/admin/models").json()["loaded"] == []
    assert gateway.get("/admin/models").json()["active"] is None
    assert gateway.post("/admin/models/load", {"modelKey": QWEN}).status_code == 200


def test_a_client_that_disconnects_does_not_disturb_another_load(
    gateway: Gateway, simulator: Simulator
) -> None:
    with stream(gateway, modelKey=QWEN) as kept:
        eventually(lambda: simulator.state()["loads"])
        start_and_disconnect(gateway, simulator, "*/*")
        assert events(kept)[-1][0] == "model_load_complete"

    def outcomes() -> dict[str, str]:
        return {load["modelKey"]: load["outcome"] for load in simulator.state()["loads"]}

    eventually_equal(outcomes, {QWEN: "loaded", SLOW: "cancelled"})
