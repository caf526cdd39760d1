"""What is sent to LM Studio is bounded in time and in memory."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

import psutil

from tests.processes import Gateway, Simulator, eventually_equal

CHAT = "/v1/chat/completions"
MIB = 1 << 20


def chat(size: int) -> bytes:
    """A chat request of at least ``size`` bytes."""
    messages = [{"role": "user", "content": "count to 3" + " " * size}]
    return json.dumps({"model": "qwen2-1.5b-instruct", "messages": messages}).encode()


@contextmanager
def never_reading() -> Iterator[socket.socket]:
    """An LM Studio that accepts connections and never reads from them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def connections(gateway: Gateway, port: int) -> int:
    """How many connections the only worker has to a port."""
    (worker,) = gateway.workers()
    found = psutil.Process(worker).net_connections("tcp")
    return len([one for one in found if one.raddr and one.raddr.port == port])


def test_a_client_that_disconnects_while_its_request_is_sent_ends_the_exchange(
    launch: Callable[..., Gateway],
) -> None:
    with never_reading() as listener:
        port = listener.getsockname()[1]
        gateway = launch(f"http://127.0.0.1:{port}", WEB_CONCURRENCY=1)
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
        with closing(connection):
            connection.request("POST", CHAT, chat(20 * MIB))
            eventually_equal(lambda: connections(gateway, port), 1)
        eventually_equal(lambda: connections(gateway, port), 0)
        eventually_equal(lambda: gateway.get("/debug/status").json()["inFlight"], [])


def test_a_client_that_resets_its_upload_ends_the_exchange(
    launch: Callable[..., Gateway],
) -> None:
    with never_reading() as listener:
        port = listener.getsockname()[1]
        gateway = launch(f"http://127.0.0.1:{port}", WEB_CONCURRENCY=1)
        client = socket.create_connection(("127.0.0.1", gateway.port), 30)
        # a reset, because the end of the stream would wait behind what the gateway does not read
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        with closing(client):
            client.sendall(
                b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Length: %d\r\n\r\n" % (50 * MIB)
            )
            eventually_equal(lambda: connections(gateway, port), 1)
            fill(client)
        eventually_equal(lambda: connections(gateway, port), 0)


def fill(client: socket.socket) -> None:
    """Send until every buffer on the way to LM Studio is full."""
    client.settimeout(0.5)
    with suppress(TimeoutError):
        while True:
            client.sendall(b"x" * 65536)


def test_large_requests_leave_the_memory_as_it_was(
    simulator: Simulator, launch: Callable[..., Gateway]
) -> None:
    gateway = launch(WEB_CONCURRENCY=1)
    worker = psutil.Process(gateway.workers()[0])
    body = chat(10 * MIB)

    def send() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
        with closing(connection):
            connection.request("POST", CHAT, body)
            assert connection.getresponse().status in (200, 400)

    for _ in range(3):
        send()
    before = worker.memory_info().rss
    for _ in range(100):
        send()
    assert worker.memory_info().rss - before < 40 * MIB


def test_proxy_timeout_does_not_count_the_upload(
    simulator: Simulator, launch: Callable[..., Gateway]
) -> None:
    """The upload takes longer than PROXY_TIMEOUT."""
    gateway = launch(WEB_CONCURRENCY=1, PROXY_TIMEOUT=2000)

    def slowly() -> Iterator[bytes]:
        for _ in range(5):
            yield b"x" * 100
            time.sleep(0.6)

    response = gateway.http.post(
        f"{gateway.url}/v1/audio/transcriptions", data=slowly(), timeout=60
    )
    assert response.status_code == 404  # LM Studio's own answer
    assert "Unexpected endpoint" in response.text
