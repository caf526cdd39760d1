"""A streamed load whose client does not read takes no memory, and ends with the client's time."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from tests.faults.harness import Patched
from tests.processes import Gateway, Simulator, eventually

SLOW = "llama-3.3-70b-instruct"
#: Makes the gateway's side of each connection hold little, ends a response that its client does not
#: read after 3 s instead of 60, and writes down how much progress waits.
INSIDE = """import socket
    import gateway.admin.operation as operation
    import gateway.serving.connection as connection
    import gateway.serving.response as response
    response.SEND_TIMEOUT = 3.0
    def small(self, sock, *more, plain=connection.Connection.__init__):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        plain(self, sock, *more)
    connection.Connection.__init__ = small
    def put(self, event, plain=operation.Events.put):
        plain(self, event)
        with open("waiting", "a") as file:
            print(sum(one[0] == "model_load_progress" for one in self._waiting), file=file)
    operation.Events.put = put"""


def waiting(gateway: Gateway) -> list[int]:
    """How much progress waited for the client, after each event that was added."""
    file = gateway.folder / "waiting"
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_load_whose_client_does_not_read_is_cancelled_and_queues_nothing(
    simulator: Simulator, tmp_path: Path
) -> None:
    simulator.faults(load_ms=120_000)
    gateway = Patched(tmp_path, simulator.url, inside=INSIDE, WEB_CONCURRENCY=1)

    def load() -> dict[str, Any]:
        found: dict[str, Any] = simulator.state()["loads"][0]
        return found

    try:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", gateway.port))
            # a long name makes long events, which soon fill what the connection holds
            body = json.dumps({"modelKey": SLOW, "instanceId": "x" * 512}).encode()
            client.sendall(
                b"POST /admin/models/load HTTP/1.1\r\nHost: localhost\r\n"
                b"Accept: text/event-stream\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            eventually(lambda: simulator.state()["loads"])
            # the client stays connected, and reads nothing
            eventually(lambda: load()["outcome"] != "loading", 60)
            assert load()["outcome"] == "cancelled"
            eventually(lambda: "client did not read its response" in gateway.logged())
            eventually(lambda: gateway.get("/debug/status").json()["inFlight"] == [])
        assert gateway.get("/admin/models").json()["loaded"] == []
        # much progress arrived that the client did not take, of which only the newest waited
        lengths = waiting(gateway)
        assert len(lengths) > 30
        assert max(lengths) == 1
    finally:
        gateway.stop()
