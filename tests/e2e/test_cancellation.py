"""A client that disconnects ends its exchange in LM Studio within a second, and no other."""

from __future__ import annotations

import json
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.nginx import Nginx
from tests.processes import Gateway, Simulator, eventually, eventually_equal

MODEL = "qwen2-1.5b-instruct"
#: The time that the contract allows, in ms.
LIMIT = 1000

#: What the client waits for when it disconnects: whether it streams, where LM Studio pauses, and
#: what the client has read by then.
SITUATIONS = {
    "mid-stream": (True, {"X-Simulator-Pace-Ms": "50"}, b'"content":"2 "'),
    "prompt-processing": (True, {"X-Simulator-Prefill-Ms": "60000"}, b""),
    "plain-before-the-head": (False, {"X-Simulator-Prefill-Ms": "60000"}, b""),
    "plain-before-the-body": (False, {"X-Simulator-Head-Delay-Ms": "60000"}, b""),
    "head-before-the-stream": (True, {"X-Simulator-Head-Delay-Ms": "60000"}, b"\r\n\r\n"),
}
WAYS: dict[str, Callable[[socket.socket], None]] = {
    "close": lambda client: client.close(),
    "half-close": lambda client: client.shutdown(socket.SHUT_WR),
}
Connect = Callable[[], socket.socket]


def connect(address: int | str) -> socket.socket:
    """A connection to a port, or to a Unix socket."""
    if isinstance(address, int):
        return socket.create_connection(("127.0.0.1", address), 10)
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(address)
    return client


@pytest.fixture(scope="module")
def unix_gateway(server: str, shared_simulator: Simulator) -> Iterator[Gateway]:
    # a Unix socket's path has to be short: pytest's folders are not
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/gateway.sock"
        gateway = Gateway(Path(folder), shared_simulator.url, server, GATEWAY_HOST=f"unix:{path}")
        yield gateway
        gateway.stop()


@pytest.fixture(scope="module")
def unix_nginx(unix_gateway: Gateway) -> Iterator[Nginx]:
    front = Nginx(unix_gateway.folder / "nginx", f"unix:{unix_gateway.unix}")
    yield front
    front.stop()


_FRONTS = {
    "tcp": ("shared_gateway", "port"),
    "unix": ("unix_gateway", "unix"),
    "nginx": ("shared_nginx", "port"),
    "nginx-unix": ("unix_nginx", "port"),
}


@pytest.fixture
def front(request: pytest.FixtureRequest, server: str, way: str, simulator: Simulator) -> Connect:
    """Connects to the gateway: directly, over its Unix socket, or through an nginx."""
    fixture, attribute = _FRONTS[way]
    address = getattr(request.getfixturevalue(fixture), attribute)
    return lambda: connect(address)


#: Every front under gunicorn; those without nginx under gevent's own server too.
every_front = pytest.mark.parametrize(
    ("server", "way"),
    [*(("gunicorn", name) for name in _FRONTS), ("gevent", "tcp"), ("gevent", "unix")],
    indirect=["server"],
    scope="module",
)


@pytest.fixture(params=["tcp", "unix"])
def direct(request: pytest.FixtureRequest, server: str, simulator: Simulator) -> Connect:
    """Connects to the gateway without an nginx."""
    fixture, attribute = _FRONTS[request.param]
    address = getattr(request.getfixturevalue(fixture), attribute)
    return lambda: connect(address)


def chat(stream: bool, headers: dict[str, str], count: int = 5000) -> bytes:
    """A chat request as it goes on the wire."""
    content = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"count to {count}"}],
        "stream": stream,
    }
    body = json.dumps(content).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        f"Content-Length: {len(body)}",
    ]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def read_until(client: socket.socket, mark: bytes) -> bytes:
    """Read until ``mark`` has arrived; returns everything that has been read."""
    received = b""
    while mark not in received:
        piece = client.recv(65536)
        assert piece, received
        received += piece
    return received


def running(simulator: Simulator, count: int = 1) -> Callable[[], bool]:
    return lambda: len([r for r in simulator.requests() if r["outcome"] == "running"]) == count


def assert_cancelled(simulator: Simulator, disconnected_at: float) -> None:
    """The only exchange ended within the limit after its client disconnected."""
    eventually(running(simulator, 0))
    (record,) = simulator.requests()
    assert record["outcome"] == "client_gone"
    assert -5 <= record["endedMs"] - disconnected_at * 1000 <= LIMIT


def outcomes(simulator: Simulator) -> list[str]:
    return sorted(record["outcome"] for record in simulator.requests())


def assert_serves(connect: Connect) -> None:
    with closing(connect()) as client:
        client.sendall(chat(False, {"Connection": "close"}, 3))
        response = b""
        while piece := client.recv(65536):
            response += piece
    assert response.startswith(b"HTTP/1.1 200 "), response
    assert b"1 2 3 " in response


@every_front
@pytest.mark.parametrize("disconnect", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_a_client_that_disconnects_ends_its_exchange(
    simulator: Simulator,
    front: Connect,
    situation: tuple[bool, dict[str, str], bytes],
    disconnect: Callable[[socket.socket], None],
) -> None:
    stream, headers, seen = situation
    with closing(front()) as client:
        client.sendall(chat(stream, headers))
        eventually(running(simulator))
        read_until(client, seen)
        disconnected_at = time.time()
        disconnect(client)
        assert_cancelled(simulator, disconnected_at)
    assert_serves(front)


@pytest.mark.both_servers
@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_a_client_that_pipelines_a_request_and_disconnects_ends_its_exchange(
    simulator: Simulator, direct: Connect, situation: tuple[bool, dict[str, str], bytes]
) -> None:
    stream, headers, seen = situation
    client = direct()
    client.sendall(chat(stream, headers))
    eventually(running(simulator))
    client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
    read_until(client, seen)
    disconnected_at = time.time()
    client.close()
    assert_cancelled(simulator, disconnected_at)
    assert_serves(direct)


@pytest.mark.both_servers
def test_a_client_that_resets_its_connection_ends_its_exchange(
    simulator: Simulator, gateway: Gateway
) -> None:
    client = connect(gateway.port)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    client.sendall(chat(False, {"X-Simulator-Prefill-Ms": "60000"}))
    eventually(running(simulator))
    disconnected_at = time.time()
    client.close()
    assert_cancelled(simulator, disconnected_at)


@pytest.mark.both_servers
def test_a_client_that_disconnects_during_its_upload_ends_its_exchange(
    simulator: Simulator, direct: Connect
) -> None:
    client = direct()
    client.sendall(
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000000\r\n\r\n--x\r\n"
    )
    eventually(running(simulator))
    disconnected_at = time.time()
    client.close()
    assert_cancelled(simulator, disconnected_at)
    assert_serves(direct)


@every_front
def test_a_client_that_waits_is_not_disturbed(simulator: Simulator, front: Connect) -> None:
    with closing(front()) as client, closing(front()) as other:
        other.sendall(chat(False, {"X-Simulator-Prefill-Ms": "60000"}))
        eventually(running(simulator))
        client.sendall(chat(False, {"X-Simulator-Prefill-Ms": "1500", "Connection": "close"}, 3))
        eventually(lambda: len(simulator.requests()) == 2)
        other.close()
        assert b"1 2 3 " in read_until(client, b"1 2 3 ")
    eventually_equal(lambda: outcomes(simulator), ["client_gone", "complete"])


@pytest.mark.both_servers
def test_pipelined_requests_are_answered_in_order(simulator: Simulator, direct: Connect) -> None:
    with closing(direct()) as client:
        client.sendall(chat(False, {"X-Simulator-Prefill-Ms": "600"}, 3))
        eventually(simulator.requests)
        client.sendall(chat(False, {}, 4))
        responses = read_until(client, b"1 2 3 4 ")
    assert responses.index(b"1 2 3 ") < responses.index(b"1 2 3 4 ")
    eventually_equal(lambda: outcomes(simulator), ["complete", "complete"])


@pytest.mark.both_servers
def test_disconnected_clients_leave_no_socket_open(
    simulator: Simulator, launch: Callable[..., Gateway]
) -> None:
    gateway = launch()
    clients = []
    for number in range(60):
        stream, headers, _ = list(SITUATIONS.values())[number % len(SITUATIONS)]
        clients.append(connect(gateway.port))
        clients[-1].sendall(chat(stream, headers))
    eventually(running(simulator, 60))
    eventually_equal(lambda: len(sockets(gateway)), 120)
    for client in clients:
        client.close()
    eventually_equal(lambda: sockets(gateway), [])
    eventually_equal(lambda: outcomes(simulator), ["client_gone"] * 60)
    assert_serves(lambda: connect(gateway.port))


def sockets(gateway: Gateway) -> list[Any]:
    """The workers' TCP connections to clients and to LM Studio."""
    found = []
    for worker in gateway.workers():
        found += psutil.Process(worker).net_connections("tcp")
    return [one for one in found if one.status != psutil.CONN_LISTEN]
