"""A load whose client disconnects is cancelled in LM Studio, or unloaded, whenever that happens."""

from __future__ import annotations

import json
import random
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import Patched
from tests.processes import Gateway, Simulator, eventually

SMALL = "qwen2-1.5b-instruct"
QWEN = "qwen2.5-7b-instruct"
SLOW = "llama-3.3-70b-instruct"
ACCEPTS = ["*/*", "text/event-stream"]
Launch = Callable[..., Gateway]


def start_load(gateway: Gateway, key: str, accept: str = "*/*") -> socket.socket:
    """Send the request for a load on a socket of its own."""
    body = json.dumps({"modelKey": key}).encode()
    head = (
        f"POST /admin/models/load HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    client = socket.create_connection(("127.0.0.1", gateway.port), 30)
    client.sendall(head.encode() + body)
    return client


def reset(client: socket.socket) -> None:
    """Disconnect without a goodbye: the server's next write fails."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def nothing_is_left(gateway: Gateway, simulator: Simulator) -> bool:
    state = simulator.state()
    loading = [load for load in state["loads"] if load["outcome"] == "loading"]
    status = gateway.get("/debug/status").json()
    active = gateway.get("/admin/models").json()["active"]
    return not (loading or state["loaded"] or status["inFlight"] or active)


@pytest.mark.both_servers
def test_no_load_survives_its_client_whenever_that_disconnects(
    gateway: Gateway, simulator: Simulator
) -> None:
    simulator.faults(load_ms=600_000)
    moments = random.Random(13)
    for number in range(120):
        client = start_load(gateway, SMALL, ACCEPTS[number % 2])
        time.sleep(moments.uniform(0, 0.03))  # at any moment up to the load's first steps
        (client.close if number % 3 else lambda one=client: reset(one))()
    eventually(lambda: nothing_is_left(gateway, simulator), 20)
    assert {load["outcome"] for load in simulator.state()["loads"]} == {"cancelled"}
    assert "Task was destroyed" not in gateway.logged()
    assert "Traceback" not in gateway.logged()


@pytest.mark.parametrize("accept", ACCEPTS)
def test_a_client_that_disconnects_while_the_config_is_read_back_gets_its_load_undone(
    gateway: Gateway, simulator: Simulator, accept: str
) -> None:
    simulator.faults(load_ms=20, silent_endpoint="getLoadConfig")
    with start_load(gateway, SMALL, accept):
        eventually(lambda: simulator.state()["loaded"])
    eventually(lambda: nothing_is_left(gateway, simulator), 5)


def test_a_client_that_disconnects_during_connect_fails_nobody_else(
    launch: Launch, simulator: Simulator
) -> None:
    gateway = launch(WEB_CONCURRENCY=1, SDK_RETRY_DELAY=10)
    simulator.reset()
    simulator.faults(silent_after_upgrade=True)
    with start_load(gateway, SMALL) as first, start_load(gateway, QWEN) as other:
        # both wait for the same connection then
        eventually(lambda: len(gateway.get("/debug/status").json()["inFlight"]) == 2)
        first.close()
        eventually(lambda: len(gateway.get("/debug/status").json()["inFlight"]) == 1)
        simulator.faults(silent_after_upgrade=False)
        assert other.recv(12) == b"HTTP/1.1 200"
    assert [load["modelKey"] for load in simulator.state()["loads"]] == [QWEN]


def test_a_load_beyond_the_grace_period_gets_an_error_event_and_is_cancelled(
    simulator: Simulator, tmp_path: Path
) -> None:
    gateway = Patched(tmp_path, simulator.url, before="launch.GRACEFUL_TIMEOUT = 4")
    simulator.faults(load_ms=600_000)
    try:
        with start_load(gateway, SLOW, "text/event-stream") as client:
            eventually(lambda: [one for one in simulator.state()["loads"] if one["progress"] > 0])
            gateway.process.send_signal(signal.SIGTERM)
            received = b""
            while data := client.recv(65536):
                received += data
        assert gateway.process.wait(20) == 0
    finally:
        gateway.stop()
    last = received.rpartition(b"event: ")[2].decode()
    assert last.startswith("error\n")
    error = json.loads(last.partition("data: ")[2].partition("\n")[0])
    assert (error["error"], error["status"]) == ("The gateway is shutting down.", 503)
    assert received.endswith(b"0\r\n\r\n")
    assert simulator.state()["loads"][0]["outcome"] == "cancelled"
