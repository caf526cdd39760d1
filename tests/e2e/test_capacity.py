"""A worker at its concurrency limit rejects further exchanges at once, and nothing else."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.faults.harness import Patched, Stream, chat, start_streams
from tests.processes import Gateway, Simulator, eventually

CHAT = "/v1/chat/completions"
LIMIT = 3


@pytest.fixture(scope="module")
def shared_small(
    shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Patched]:
    """A gateway with one worker, which serves three exchanges at a time."""
    before = "launch.GRACEFUL_TIMEOUT = 3"
    inside = f"gateway.proxy.exchange.MAX_EXCHANGES = {LIMIT}"
    folder = tmp_path_factory.mktemp("small")
    gateway = Patched(folder, shared_simulator.url, before, inside, WEB_CONCURRENCY=1)
    yield gateway
    gateway.stop()


@pytest.fixture
def small(shared_small: Patched, simulator: Simulator) -> Patched:
    eventually(lambda: ask(shared_small) == 200, 30)
    return shared_small


@pytest.fixture
def busy(small: Patched) -> Iterator[list[Stream]]:
    running = start_streams(small.port, LIMIT, count=2000, pace_ms=50)
    yield running
    for one in running:
        one.sock.shutdown(socket.SHUT_RDWR)
        one.join()


def ask(gateway: Gateway) -> int:
    return gateway.http.post(gateway.url + CHAT, chat(2, False), timeout=30).status_code


@pytest.mark.parametrize(
    ("path", "dialect"), [(CHAT, "openai"), ("/v1/messages", "anthropic"), ("/v1/models", "openai")]
)
def test_one_more_exchange_gets_503_with_retry_after(
    small: Patched, busy: list[Stream], path: str, dialect: str
) -> None:
    response = small.http.post(small.url + path, chat(2, False), timeout=30)
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) >= 1
    error = response.json()["error"]
    if dialect == "anthropic":
        assert error["type"] == "overloaded_error"
    else:
        assert error["code"] == "overloaded"


@pytest.mark.parametrize(
    "path", ["/health", "/health/ready", "/admin/models", "/debug/status", "/metrics"]
)
def test_health_and_administration_are_still_served(
    small: Patched, busy: list[Stream], path: str
) -> None:
    assert small.get(path).status_code == 200


def test_exchanges_in_flight_are_not_disturbed(small: Patched, simulator: Simulator) -> None:
    # long enough for ten more requests, even on a busy machine
    running = start_streams(small.port, LIMIT, count=120, pace_ms=50)
    assert {ask(small) for _ in range(10)} == {503}
    for one in running:
        one.join()
    assert all(one.complete for one in running)


@pytest.mark.parametrize("how", ["complete", "disconnect"])
def test_an_exchange_that_ends_frees_its_slot(
    small: Patched, simulator: Simulator, how: str
) -> None:
    length = 80 if how == "complete" else 2000
    running = start_streams(small.port, LIMIT, count=length, pace_ms=50)
    assert ask(small) == 503
    if how == "disconnect":
        for one in running:
            one.sock.shutdown(socket.SHUT_RDWR)
    eventually(lambda: ask(small) == 200, 30)
    assert [ask(small) for _ in range(3 * LIMIT)] == [200] * (3 * LIMIT)
    for one in running:
        one.join()


def test_failures_do_not_use_up_slots(small: Patched, simulator: Simulator) -> None:
    for fault in ("close-before-head", "break-plain", "refuse-500", "error-200") * 3:
        headers = {"X-Simulator-Fault": fault}
        try:
            small.http.post(small.url + CHAT, chat(2, False), headers=headers, timeout=30)
        except OSError:
            assert fault == "break-plain"
    assert [ask(small) for _ in range(2 * LIMIT)] == [200] * (2 * LIMIT)
