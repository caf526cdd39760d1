"""Bodies that are made to use time and memory use neither."""

from __future__ import annotations

import threading
from collections.abc import Callable

import psutil
import pytest

from tests.processes import Gateway

MIB = 1 << 20
#: Malformed at their very end, so that the gateway scans all of it and sends nothing.
BODIES = {
    "members": b'{"x":{%b"z":1}' % b"".join(b'"k%d":%d,' % (n, n) for n in range(2_000_000)),
    "objects": b'{"x":[%b1]' % (b'{"a":1,"b":"x"},' * 2_000_000),
    "nested": b'{"x":[%b1]' % (b"[[[[[[]]]]]]," * 200_000),
    "escapes": b'{"x":"%b"' % (b"\\n" * 16_000_000),
    "numbers": b'{"x":[%b1]' % (b"1," * 16_000_000),
}


def memory(gateway: Gateway) -> int:
    """Resident memory of all processes of the gateway, in MiB."""
    main = psutil.Process(gateway.process.pid)
    processes = [main, *main.children(recursive=True)]
    return sum(int(one.memory_info().rss) for one in processes) // MIB


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_large_body_delays_no_other_request(launch: Callable[..., Gateway], body: bytes) -> None:
    gateway = launch(WEB_CONCURRENCY=1)
    statuses: list[int] = []

    def post() -> None:
        url = f"{gateway.url}/v1/chat/completions"
        statuses.append(gateway.http.post(url, data=body, timeout=120).status_code)

    before = memory(gateway)
    sender = threading.Thread(target=post)
    sender.start()
    slowest, most = 0.0, 0
    while sender.is_alive():
        started = gateway.processor_time()
        assert gateway.get("/openapi.json", timeout=60).status_code == 200
        slowest = max(slowest, gateway.processor_time() - started)
        most = max(most, memory(gateway))
    sender.join()
    assert statuses == [400]
    # as measured: 0.1 s at most, and up to 0.8 s if scanning never paused
    assert slowest < 0.3
    # the body, in pieces and joined
    assert most - before < 2.5 * len(body) / MIB + 30


def test_rejected_requests_with_huge_model_names_leave_nothing_behind(
    launch: Callable[..., Gateway],
) -> None:
    gateway = launch(WEB_CONCURRENCY=1)

    def reject(number: int) -> None:
        name = f"{number}" + "m" * MIB
        body = {"model": name, "messages": [{"role": "user", "content": "hello"}]}
        response = gateway.post("/v1/chat/completions", body, timeout=60)
        assert 400 <= response.status_code < 500

    for number in range(10):
        reject(number)
    before = memory(gateway)
    for number in range(60):
        reject(number)
    assert memory(gateway) - before < 30
    gateway.stop()
    assert sum(path.stat().st_size for path in gateway.folder.glob("state.db*")) < 6 * MIB
    log = gateway.logged()
    assert log.count("/v1/chat/completions") == 70
    assert len(log) < 100_000
    assert "m" * 201 not in log
