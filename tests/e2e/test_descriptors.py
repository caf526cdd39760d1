"""When descriptors run short, peers that the allowlist can't admit take none."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import psutil
import pytest

from gateway.serving.descriptors import PRESSURE
from tests.processes import Gateway, eventually

pytestmark = pytest.mark.both_servers

#: Addresses of this machine, from which clients connect.
STRANGER, FRIEND, PROXY = "127.0.0.1", "127.0.0.2", "127.0.0.3"
REQUEST = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"


def connect(gateway: Gateway, address: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.port), 30, (address, 0))


def answer(gateway: Gateway, address: str, headers: bytes = b"") -> bytes:
    """The start of the response; empty if the connection closes without a byte."""
    with connect(gateway, address) as client:
        received = b""
        try:
            client.sendall(REQUEST + headers + b"\r\n")
            while piece := client.recv(65536):
                received += piece
        except ConnectionError:
            pass  # the gateway closed the connection without reading the request
        return received[:12]


@contextmanager
def few_descriptors(gateway: Gateway) -> Iterator[None]:
    """Lower the worker's limit, so that its next descriptor is beyond the part that is plenty."""
    (worker,) = gateway.workers()
    process = psutil.Process(worker)
    before = process.rlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir(f"/proc/{worker}/fd")}
    lowest_free = min(set(range(len(used) + 1)) - used)
    process.rlimit(resource.RLIMIT_NOFILE, (int(lowest_free / PRESSURE), before[1]))
    try:
        yield
    finally:
        process.rlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def choosy(launch: Callable[..., Gateway]) -> Iterator[Gateway]:
    """A gateway that admits one address and trusts one proxy, with 60 open connections."""
    gateway = launch(IP_ALLOWLIST=FRIEND, TRUSTED_PROXIES=PROXY, WEB_CONCURRENCY=1)
    with ExitStack() as stack:
        for _ in range(60):
            client = stack.enter_context(connect(gateway, FRIEND))
            client.sendall(REQUEST.replace(b"close", b"keep-alive") + b"\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
        yield gateway


def test_a_peer_that_cannot_be_admitted_gets_its_403(choosy: Gateway) -> None:
    assert answer(choosy, STRANGER) == b"HTTP/1.1 403"
    assert answer(choosy, FRIEND) == b"HTTP/1.1 200"


def test_under_pressure_a_peer_that_cannot_be_admitted_is_closed_without_a_byte(
    choosy: Gateway,
) -> None:
    with few_descriptors(choosy):
        for _ in range(20):
            assert answer(choosy, STRANGER) == b""
        with connect(choosy, STRANGER) as silent:
            assert silent.recv(1) == b""  # at accept, not after its request
        eventually(lambda: "open files run short" in choosy.logged())
    assert answer(choosy, STRANGER) == b"HTTP/1.1 403"


def test_under_pressure_a_peer_that_may_be_admitted_is_served(choosy: Gateway) -> None:
    with few_descriptors(choosy):
        assert answer(choosy, FRIEND) == b"HTTP/1.1 200"
    with few_descriptors(choosy):
        forwarded = b"X-Forwarded-For: %b\r\n"
        assert answer(choosy, PROXY, forwarded % FRIEND.encode()) == b"HTTP/1.1 200"
    with few_descriptors(choosy):
        assert answer(choosy, PROXY, forwarded % STRANGER.encode()) == b"HTTP/1.1 403"
