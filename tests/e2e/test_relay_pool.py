"""Connections to LM Studio are reused, and no request fails because LM Studio closed one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from tests.processes import Gateway, Simulator, eventually, free_port

CHAT = "/v1/chat/completions"


def body(stream: bool = False) -> dict[str, Any]:
    messages = [{"role": "user", "content": "count to 3"}]
    return {"model": "qwen2-1.5b-instruct", "messages": messages, "stream": stream}


def upstream(gateway: Gateway, port: int) -> list[Any]:
    """The only worker's connections to LM Studio."""
    (worker,) = gateway.workers()
    found = psutil.Process(worker).net_connections("tcp")
    return [one for one in found if one.raddr and one.raddr.port == port]


def assert_serves(gateway: Gateway, stream: bool) -> None:
    response = gateway.post(CHAT, body(stream))
    assert (response.status_code, "3 " in response.text) == (200, True), response.text


def fill_pool(gateway: Gateway, port: int, size: int = 8) -> None:
    """Fill the pool with idle connections."""
    slow = {"X-Simulator-Prefill-Ms": "500"}

    def filled() -> bool:
        with ThreadPoolExecutor(size) as pool:
            responses = [pool.submit(gateway.post, CHAT, body(), headers=slow) for _ in range(size)]
            assert {response.result().status_code for response in responses} == {200}
        return len(upstream(gateway, port)) == size

    # repeated if the requests did not all run at the same time
    eventually(filled)


def test_requests_reuse_a_connection(simulator: Simulator, launch: Callable[..., Gateway]) -> None:
    gateway = launch(WEB_CONCURRENCY=1)
    used = set()
    for number in range(20):
        assert_serves(gateway, stream=number % 2 == 1)
        used |= {one.laddr.port for one in upstream(gateway, simulator.port)}
    assert len(used) <= 2


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_no_request_fails_because_lmstudio_closed_idle_connections(
    simulator: Simulator, launch: Callable[..., Gateway], stream: bool
) -> None:
    gateway = launch(WEB_CONCURRENCY=1)
    fill_pool(gateway, simulator.port)

    def all_closed() -> bool:
        states = {one.status for one in upstream(gateway, simulator.port)}
        return states <= {psutil.CONN_CLOSE_WAIT}

    eventually(all_closed)
    for _ in range(10):
        assert_serves(gateway, stream)
    eventually(lambda: len(upstream(gateway, simulator.port)) <= 2)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_no_request_fails_after_lmstudio_has_restarted(
    launch: Callable[..., Gateway], stream: bool
) -> None:
    port = free_port()
    first = Simulator(port)
    gateway = launch(first.url, WEB_CONCURRENCY=1)
    fill_pool(gateway, port)
    first.stop()
    unreachable = gateway.post(CHAT, body(stream))
    assert unreachable.status_code == 503
    assert unreachable.json()["error"]["code"] == "lmstudio_unreachable"
    second = Simulator(port)
    try:
        for _ in range(10):
            assert_serves(gateway, stream)
    finally:
        second.stop()


class ClosesOnReuse:
    """An LM Studio that closes a connection when the second request arrives on it."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.requests: list[bytes] = []
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            with connection:
                for is_first in (True, False):
                    received = connection.recv(65536)
                    if not received:
                        break
                    if received == b"stop":
                        return
                    self.requests.append(received)
                    if not is_first:
                        break
                    last = b"Connection: close\r\n" if len(self.requests) > 2 else b""
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\n" + last + b"Content-Length: 2\r\n\r\n{}"
                    )
                    if last:
                        break

    def stop(self) -> None:
        with socket.create_connection(self.listener.getsockname()) as last:
            last.sendall(b"stop")
            self.thread.join(10)
        self.listener.close()


def test_a_get_is_sent_again_when_lm_studio_closes_the_connection(
    launch: Callable[..., Gateway],
) -> None:
    lm_studio = ClosesOnReuse()
    try:
        gateway = launch(lm_studio.url, WEB_CONCURRENCY=1)
        assert [gateway.get("/v1/models").status_code for _ in range(2)] == [200, 200]
        assert len(lm_studio.requests) == 3
    finally:
        lm_studio.stop()


def test_a_request_that_was_sent_is_never_sent_again(launch: Callable[..., Gateway]) -> None:
    lm_studio = ClosesOnReuse()
    try:
        gateway = launch(lm_studio.url, WEB_CONCURRENCY=1)
        assert gateway.get("/v1/models").status_code == 200
        response = gateway.post(CHAT, body())
        assert (response.status_code, response.json()["error"]["code"]) == (502, "bad_gateway")
        assert len(lm_studio.requests) == 2
        assert gateway.get("/v1/models").status_code == 200
    finally:
        lm_studio.stop()


def test_proxies_in_the_environment_are_ignored(
    simulator: Simulator, launch: Callable[..., Gateway]
) -> None:
    nowhere = "http://127.0.0.1:9"
    names = ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"]
    gateway = launch(WEB_CONCURRENCY=1, **dict.fromkeys(names, nowhere))
    for stream in (False, True):
        assert_serves(gateway, stream)
    assert gateway.get("/admin/models").status_code == 200
