"""SIGHUP applies new settings in place: no worker is replaced, and nothing is cut."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.processes import Gateway, Simulator, eventually, eventually_equal

MODEL = "qwen2-1.5b-instruct"
FIRST, SECOND = "first-key-0123456789abc", "second-key-0123456789ab"
ROOT = Path(__file__).parents[2]


class Configured(Gateway):
    """A gateway whose settings are in ``.env``, under gunicorn, plain gunicorn or gevent."""

    def command(self) -> list[str]:
        if self.server == "wsgi:app":
            # the working directory is the folder of .env, not the checkout
            configuration = str(ROOT / "gunicorn.conf.py")
            return [sys.executable, "-m", "gunicorn", "-c", configuration, "wsgi:app"]
        return super().command()

    def configure(self, *lines: str) -> None:
        """Write ``.env``; another setting of the environment would win over it."""
        (self.folder / ".env").write_text("".join(f"{line}\n" for line in lines))

    def reload(self, log_line: str) -> None:
        """Send SIGHUP and wait for what the log says to it."""
        before = self.logged().count(log_line)
        self.process.send_signal(signal.SIGHUP)
        eventually(lambda: self.logged().count(log_line) > before)

    def status(self, key: str, path: str = "/v1/models") -> int:
        """The status of a request over a connection of its own, so that any worker answers."""
        headers = {"Authorization": f"Bearer {key}"}
        return requests.get(self.url + path, headers=headers, timeout=30).status_code


Make = Callable[..., Configured]


@pytest.fixture(params=["gunicorn", "wsgi:app", "gevent"])
def make(request: pytest.FixtureRequest, tmp_path: Path, simulator: Simulator) -> Iterator[Make]:
    """Start a gateway with the lines of a ``.env``."""
    started: list[Configured] = []

    def start(*lines: str, **settings: Any) -> Configured:
        (tmp_path / ".env").write_text("".join(f"{line}\n" for line in lines))
        settings = {"PYTHONPATH": ROOT, **settings}
        started.append(Configured(tmp_path, simulator.url, request.param, **settings))
        return started[-1]

    yield start
    for gateway in started:
        gateway.stop()


def stream(gateway: Gateway, key: str, count: int) -> requests.Response:
    """Start a chat that streams ``count`` numbers, 50 a second."""
    body = {
        "model": MODEL,
        "stream": True,
        "messages": [{"role": "user", "content": f"count to {count}"}],
    }
    headers = {"Authorization": f"Bearer {key}", "X-Simulator-Pace-Ms": "20"}
    url = f"{gateway.url}/v1/chat/completions"
    response = requests.post(url, json=body, headers=headers, stream=True, timeout=60)
    assert response.status_code == 200
    return response


def test_keys_change_in_every_worker_and_streams_go_on(make: Make) -> None:
    gateway = make(f"GATEWAY_API_KEY={FIRST}")
    workers = gateway.workers()
    running = stream(gateway, FIRST, 200)
    gateway.configure(f"GATEWAY_API_KEY={SECOND}")
    gateway.reload("Settings reloaded (changed: GATEWAY_API_KEY)")
    eventually_equal(lambda: {gateway.status(SECOND) for _ in range(8)}, {200})
    eventually_equal(lambda: {gateway.status(FIRST) for _ in range(8)}, {401})
    assert b"data: [DONE]" in running.content
    assert gateway.workers() == workers


def test_bad_settings_are_reported_and_change_nothing(make: Make) -> None:
    gateway = make(f"GATEWAY_API_KEY={FIRST}")
    workers = gateway.workers()
    gateway.configure(f"GATEWAY_API_KEY={SECOND}", "PROXY_TIMEOUT=soon")
    gateway.reload("settings not reloaded: PROXY_TIMEOUT: must be")
    assert gateway.status(FIRST) == 200
    assert gateway.status(SECOND) == 401
    assert gateway.workers() == workers
    assert "Traceback" not in gateway.logged()


@pytest.mark.parametrize("make", ["gunicorn", "wsgi:app"], indirect=True)  # gevent's never restarts
def test_a_worker_that_starts_later_has_the_settings_that_were_validated(make: Make) -> None:
    gateway = make(f"GATEWAY_API_KEY={FIRST}")
    gateway.configure(f"GATEWAY_API_KEY={SECOND}")
    gateway.reload("Settings reloaded")
    gateway.configure("PROXY_TIMEOUT=soon")  # nobody has asked for it
    ready = gateway.logged().count("Worker ready")
    for pid in gateway.workers():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: gateway.logged().count("Worker ready") >= ready + 2)
    eventually_equal(lambda: {gateway.status(SECOND) for _ in range(8)}, {200})


def test_what_needs_a_restart_is_named_and_stays(make: Make) -> None:
    gateway = make("SDK_RETRY_DELAY=10")
    gateway.configure("SDK_RETRY_DELAY=20", "LOG_FORMAT=json")
    gateway.reload("Settings reloaded (changed: SDK_RETRY_DELAY)")
    assert "LOG_FORMAT has changed: the change needs a restart" in gateway.logged()
    requests.get(f"{gateway.url}/health", headers={"X-Request-Id": "as-before"}, timeout=30)
    eventually(lambda: "requestId=as-before" in gateway.logged())


def test_limits_and_the_log_level_change(make: Make) -> None:
    # one worker: two would not change at the same moment
    gateway = make("LOG_LEVEL=info", "MAX_BODY_BYTES=1000000", WEB_CONCURRENCY=1)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 5000}]}

    def status(request_id: str) -> int:
        headers = {"X-Request-Id": request_id}
        url = f"{gateway.url}/v1/chat/completions"
        return requests.post(url, json=body, headers=headers, timeout=30).status_code

    assert status("first") == 200
    gateway.configure("LOG_LEVEL=warn", "MAX_BODY_BYTES=1000")
    gateway.process.send_signal(signal.SIGHUP)
    eventually_equal(lambda: status("changing"), 413)
    assert status("quiet") == 413
    gateway.configure("LOG_LEVEL=info", "MAX_BODY_BYTES=1000")
    gateway.reload("Settings reloaded (changed: LOG_LEVEL)")
    # a worker may take a moment longer than the master, which writes that line
    eventually(lambda: status("loud") == 413 and "requestId=loud" in gateway.logged())
    assert "requestId=first" in gateway.logged()
    assert "requestId=quiet" not in gateway.logged()
