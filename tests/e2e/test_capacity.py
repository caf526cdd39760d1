"""A worker that has as many exchanges as it takes refuses the next one at once, and that alone."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.faults.stage import Patched, Stream, chat, streams
from tests.processes import Gateway, Simulator, eventually

CHAT = "/v1/chat/completions"
BOUND = 3


@pytest.fixture(scope="module")
def shared_small(
    shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Patched]:
    """One worker that runs three exchanges at a time."""
    before = "server.GRACEFUL_TIMEOUT = 3"
    inside = f"gateway.proxy.exchange.MAX_EXCHANGES = {BOUND}"
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
    running = streams(small.port, BOUND, count=2000, pace_ms=50)
    yield running
    for one in running:
        one.sock.shutdown(socket.SHUT_RDWR)
        one.join()


def ask(gateway: Gateway) -> int:
    return gateway.http.post(gateway.url + CHAT, chat(2, False), timeout=30).status_code


@pytest.mark.parametrize(
    ("path", "spoken"), [(CHAT, "openai"), ("/v1/messages", "anthropic"), ("/v1/models", "openai")]
)
def test_one_more_gets_503_with_retry_after(
    small: Patched, busy: list[Stream], path: str, spoken: str
) -> None:
    answer = small.http.post(small.url + path, chat(2, False), timeout=30)
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    error = answer.json()["error"]
    if spoken == "anthropic":
        assert error["type"] == "overloaded_error"
    else:
        assert error["code"] == "overloaded"


@pytest.mark.parametrize(
    "path", ["/health", "/health/ready", "/admin/models", "/debug/status", "/metrics"]
)
def test_health_and_administration_still_answer(
    small: Patched, busy: list[Stream], path: str
) -> None:
    assert small.get(path).status_code == 200


def test_those_that_run_are_not_disturbed(small: Patched, simulator: Simulator) -> None:
    running = streams(small.port, BOUND, count=40, pace_ms=50)
    assert {ask(small) for _ in range(10)} == {503}
    for one in running:
        one.join()
    assert all(one.complete for one in running)


@pytest.mark.parametrize("how", ["finish", "leave"])
def test_who_finishes_or_leaves_makes_room(small: Patched, simulator: Simulator, how: str) -> None:
    length = 40 if how == "finish" else 2000
    running = streams(small.port, BOUND, count=length, pace_ms=50)
    assert ask(small) == 503
    if how == "leave":
        for one in running:
            one.sock.shutdown(socket.SHUT_RDWR)
    eventually(lambda: ask(small) == 200, 30)
    assert [ask(small) for _ in range(3 * BOUND)] == [200] * (3 * BOUND)
    for one in running:
        one.join()


def test_the_bound_is_not_used_up_by_failures(small: Patched, simulator: Simulator) -> None:
    for fault in ("close-before-head", "break-plain", "refuse-500", "error-200") * 3:
        headers = {"X-Simulator-Fault": fault}
        try:
            small.http.post(small.url + CHAT, chat(2, False), headers=headers, timeout=30)
        except OSError:
            assert fault == "break-plain"
    assert [ask(small) for _ in range(2 * BOUND)] == [200] * (2 * BOUND)
