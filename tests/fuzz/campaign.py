"""Random requests against a real gateway: ``python -m tests.fuzz.campaign --requests 20000``.

Never a 5xx other than the contract's own, never a page of HTML, an error always in the dialect of
its path, never a traceback in the log, never a worker that hangs or was restarted. Exits 1 and says
what was sent when one of these is broken.
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

from tests.fuzz.shapes import Shot, volleys
from tests.processes import Gateway, Simulator

#: Seconds in which every request must be answered.
DEADLINE = 30.0
_CODES = {
    502: {"bad_gateway", None},
    503: {"lmstudio_unreachable", "overloaded", None},
    504: {"upstream_timeout"},
}
_MESSAGES = ("/v1/messages", "/messages")
_FLAT = ("/admin", "/debug", "/health", "/metrics")


class Range:
    """A gateway and LM Studio's simulator to shoot at."""

    def __init__(self, folder: Path) -> None:
        self.simulator = Simulator(0, "--pace-ms", "0")
        self.gateway = Gateway(folder, self.simulator.url, PROXY_TIMEOUT=20000)
        self.workers = self.gateway.workers()
        self.statuses: Counter[int] = Counter()

    def stop(self) -> None:
        self.gateway.stop()
        self.simulator.stop()

    def fire(self, shot: Shot) -> None:
        """Send one request and judge what comes back."""
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.port, timeout=DEADLINE)
        try:
            connection.putrequest(shot.method, shot.path)
            for name, value in shot.headers:
                connection.putheader(name, value.encode("latin-1"))
            connection.putheader("Content-Length", str(len(shot.body)))
            connection.endheaders(shot.body)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        self.statuses[answer.status] += 1
        self.judge(shot, answer, content)

    def judge(self, shot: Shot, answer: http.client.HTTPResponse, content: bytes) -> None:
        status = answer.status
        assert answer.headers["X-Request-Id"], shot
        assert not content or answer.headers.get_content_type() != "text/html", (shot, content)
        if status < 400 or answer.headers.get_content_type() == "text/event-stream":
            return
        told = json.loads(content)
        error = told["error"]
        path = shot.path.partition("?")[0]
        code = None
        if path in _MESSAGES:
            assert told["type"] == "error", (shot, content)
            assert set(error) == {"type", "message"}, (shot, content)
        elif path.startswith(_FLAT):
            assert isinstance(error, str), (shot, content)
            assert told["requestId"], (shot, content)
        else:
            assert set(error) >= {"message", "type", "param", "code"}, (shot, content)
            code = error["code"]
        if status >= 500:
            ours = status in _CODES and code in _CODES[status]
            assert ours or self._upstream_said(status), (shot, status, content)

    def still_well(self) -> None:
        """To be asked now and then, as it costs."""
        assert self.gateway.workers() == self.workers, "a worker was restarted"
        for _ in range(8):
            assert self.gateway.http.get(f"{self.gateway.url}/health", timeout=20).ok
            self.gateway.http.close()
        log = self.gateway.logged()
        assert "Traceback" not in log, log[log.index("Traceback") :][:3000]
        running = [one["target"] for one in self.simulator.requests() if one["endedMs"] is None]
        assert len(running) < 5, f"exchanges are left over: {running}"

    def _upstream_said(self, status: int) -> bool:
        return any(one["status"] == status for one in self.simulator.requests()[-3:])


def play(place: Range, requests: int, seconds: float) -> int:
    """So many requests at most, for so long at most; returns how many there were."""
    began, fired = time.monotonic(), 0

    @settings(
        max_examples=requests // 8,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=requests < 5000,
    )
    @given(volleys)
    def shoot(volley: list[Shot]) -> None:
        nonlocal fired
        if time.monotonic() - began > seconds:
            return
        for shot in volley:
            place.fire(shot)
        fired += len(volley)
        if fired % 1000 == 0:
            place.still_well()
            place.simulator.reset()

    shoot()
    place.still_well()
    return fired


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20000)
    parser.add_argument("--minutes", type=float, default=20)
    asked = parser.parse_args()
    fired = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Range(Path(folder))
        began = time.monotonic()
        try:
            # several rounds, as hypothesis remembers what it tried in each
            while fired < asked.requests and time.monotonic() - began < asked.minutes * 60:
                left = asked.minutes * 60 - (time.monotonic() - began)
                fired += play(place, min(5000, asked.requests - fired), left)
            print(f"{fired} requests in {time.monotonic() - began:.0f} s", dict(place.statuses))
        finally:
            place.stop()
    return 0 if fired >= asked.requests else 1


if __name__ == "__main__":
    sys.exit(main())
