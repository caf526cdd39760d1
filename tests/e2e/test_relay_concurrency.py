"""Many streams at the same time: each is complete and in order."""

from __future__ import annotations

import http.client
import json
import re
from concurrent.futures import ThreadPoolExecutor

from tests.processes import Gateway, Simulator, eventually_equal

STREAMS, TOKENS = 100, 50
#: Each stream takes 7.5 s, so that all of them have started before the first one ends.
PACE_MS = 150


def numbers(gateway: Gateway, pace_ms: int) -> list[int]:
    """Stream numbered tokens and return them in the order of arrival; raises if it breaks off."""
    content = {
        "model": "qwen2-1.5b-instruct",
        "messages": [{"role": "user", "content": f"count to {TOKENS}"}],
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
    headers = {"Content-Type": "application/json", "X-Simulator-Pace-Ms": str(pace_ms)}
    connection.request("POST", "/v1/chat/completions", json.dumps(content), headers)
    response = connection.getresponse()
    assert response.status == 200
    body = response.read()
    connection.close()
    assert body.endswith(b"data: [DONE]\n\n")
    return [int(number) for number in re.findall(rb'"content":"(\d+) "', body)]


def test_a_hundred_streams_at_once_are_complete_and_in_order(
    gateway: Gateway, simulator: Simulator
) -> None:
    with ThreadPoolExecutor(STREAMS) as pool:
        found = list(pool.map(lambda _: numbers(gateway, PACE_MS), range(STREAMS)))
    assert found == [list(range(1, TOKENS + 1))] * STREAMS
    eventually_equal(lambda: [r["outcome"] for r in simulator.requests()], ["complete"] * STREAMS)
    records = simulator.requests()
    # all of them ran at the same time
    assert max(r["startedMs"] for r in records) < min(r["endedMs"] for r in records)
