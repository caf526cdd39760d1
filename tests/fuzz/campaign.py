"""Sends random requests to a real gateway: ``python -m tests.fuzz.campaign --requests 20000``.

Whatever they contain, there must be no 5xx other than those of the contract, no HTML page, no error
in a dialect other than that of its path, no traceback in the log, and no worker that hangs or is
restarted. Otherwise the campaign prints the request and exits with status 1.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.shapes import Request, batches
from tests.processes import (
    Gateway,
    Simulator,
    default_signals_for_children,
    eventually_equal,
)

#: Seconds within which every response must arrive.
DEADLINE = 30.0
#: The error codes of the contract, by status; None is for dialects without codes.
_CODES = {
    502: {"bad_gateway", None},
    503: {"lmstudio_unreachable", "overloaded", None},
    504: {"upstream_timeout"},
}
_MESSAGES = ("/v1/messages", "/messages")
_FLAT = ("/admin", "/debug", "/health", "/metrics")


class Target:
    """A gateway and LM Studio's simulator, to which the requests go."""

    def __init__(self, folder: Path) -> None:
        self.simulator = Simulator(0, "--pace-ms", "0")
        self.gateway = Gateway(folder, self.simulator.url, PROXY_TIMEOUT=20000)
        self.workers = self.gateway.workers()
        self.statuses: Counter[int] = Counter()

    def stop(self) -> None:
        self.gateway.stop()
        self.simulator.stop()

    def send(self, request: Request) -> None:
        """Send one request and check the response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.port, timeout=DEADLINE)
        try:
            connection.putrequest(request.method, request.path)
            for name, value in request.headers:
                connection.putheader(name, value.encode("latin-1"))
            if not any(name == "Content-Type" for name, _ in request.headers):
                # the gateway has no keys, so its /admin takes nothing else
                connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", str(len(request.body)))
            connection.endheaders(request.body)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        self.statuses[response.status] += 1
        self.check(request, response, content)

    def check(self, request: Request, response: http.client.HTTPResponse, content: bytes) -> None:
        status = response.status
        assert response.headers["X-Request-Id"], request
        assert not content or response.headers.get_content_type() != "text/html", (request, content)
        if status < 400 or response.headers.get_content_type() == "text/event-stream":
            return
        body = json.loads(content)
        error = body["error"]
        path = request.path.partition("?")[0]
        code = None
        if path in _MESSAGES:
            assert body["type"] == "error", (request, content)
            assert set(error) == {"type", "message"}, (request, content)
        elif path.startswith(_FLAT):
            assert isinstance(error, str), (request, content)
            assert body["requestId"], (request, content)
        else:
            assert set(error) >= {"message", "type", "param", "code"}, (request, content)
            code = error["code"]
        if status >= 500:
            expected = status in _CODES and code in _CODES[status]
            assert expected or self._upstream_sent(status), (request, status, content)

    def check_gateway(self) -> None:
        """Check workers, health, log and exchanges in flight; too slow for every request."""
        assert self.gateway.workers() == self.workers, "a worker was restarted"
        for _ in range(8):
            assert self.gateway.http.get(f"{self.gateway.url}/health", timeout=20).ok
            self.gateway.http.close()
        log = self.gateway.logged()
        assert "Traceback" not in log, log[log.index("Traceback") :][:3000]
        eventually_equal(self._running, [])

    def _running(self) -> list[str]:
        """The targets of the exchanges that are in flight."""
        return [one["target"] for one in self.simulator.requests() if one["endedMs"] is None]

    def _upstream_sent(self, status: int) -> bool:
        return any(one["status"] == status for one in self.simulator.requests()[-3:])


def run(target: Target, requests: int, seconds: float) -> int:
    """Send at most ``requests`` requests for at most ``seconds``; returns how many were sent."""
    began, sent = time.monotonic(), 0

    @settings(
        max_examples=requests // 8,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=requests < 5000,
    )
    @given(batches)
    def send(batch: list[Request]) -> None:
        nonlocal sent
        if time.monotonic() - began > seconds:
            return
        for request in batch:
            target.send(request)
        sent += len(batch)
        if sent % 1000 == 0:
            target.check_gateway()
            target.simulator.reset()

    send()
    target.check_gateway()
    return sent


def main() -> int:
    default_signals_for_children()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20000)
    parser.add_argument("--minutes", type=float, default=20)
    options = parser.parse_args()
    sent = 0
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder))
        began = time.monotonic()
        try:
            # several rounds, because hypothesis remembers everything that it tried in a round
            while sent < options.requests and time.monotonic() - began < options.minutes * 60:
                left = options.minutes * 60 - (time.monotonic() - began)
                sent += run(target, min(5000, options.requests - sent), left)
            print(f"{sent} requests in {time.monotonic() - began:.0f} s", dict(target.statuses))
        finally:
            target.stop()
    return 0 if sent >= options.requests else 1


if __name__ == "__main__":
    sys.exit(main())
