"""The processes of the end-to-end tests: simulators and gateways."""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import requests

from gateway.settings import TABLE

START_TIMEOUT = 60.0
#: Python itself ignores these two, and ``subprocess`` restores their default action in children.
_PYTHONS_OWN = {signal.SIGPIPE, signal.SIGXFSZ}


def default_signals_for_children() -> None:
    """Start child processes with the default action for every signal.

    The tests themselves may run with signals ignored: a shell makes its background jobs ignore
    SIGINT, and ``nohup`` makes a command ignore SIGHUP. Children inherit that, so a command under
    test would never notice the Ctrl-C that a test sends it. This function gives each ignored signal
    a handler that does nothing. The process still ignores the signal, but ``exec`` resets handlers,
    which it does not do for ignored signals.

    Call it in the main thread, before anything is started.
    """
    for number in signal.valid_signals() - _PYTHONS_OWN:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def eventually(condition: Callable[[], Any], timeout: float = 30.0) -> Any:
    """Wait until ``condition`` returns something true and return it; fail at the deadline."""
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, f"not within {timeout} s: {condition}"
        time.sleep(0.02)


def eventually_equal(read: Callable[[], Any], expected: Any) -> None:
    """Wait until ``read`` returns the expected value; at the deadline, fail and show the last."""
    found: list[Any] = []

    def equal() -> bool:
        found[:] = [read()]
        return bool(found == [expected])

    try:
        eventually(equal)
    except AssertionError:
        raise AssertionError(f"{found[0]!r} instead of {expected!r}") from None


def clean_environ() -> dict[str, str]:
    """The environment of the tests without the developer's settings of the gateway."""
    settings = {setting.variable for setting in TABLE} | {"WEB_CONCURRENCY", "GATEWAY_URL"}
    return {name: text for name, text in os.environ.items() if name not in settings}


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Simulator:
    """``python -m gateway.simulator`` and its control paths."""

    def __init__(self, port: int = 0, *arguments: str) -> None:
        command = [sys.executable, "-m", "gateway.simulator", "--port", str(port), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode().strip()
        assert "listening on" in line, line
        self.url = line.rpartition(" ")[2]
        self.port = int(self.url.rpartition(":")[2])
        self.http = _session()
        # a simulator with TLS has a test certificate
        self.http.verify = False

    def faults(self, **switches: Any) -> None:
        self._control("POST", "faults", switches)

    def reset(self) -> None:
        self._control("POST", "reset", {})

    def state(self) -> dict[str, Any]:
        return self._control("GET", "state")

    def requests(self, since: int = 0) -> list[dict[str, Any]]:
        """The recorded requests, ``body`` and ``sent`` as bytes."""
        found = self._control("GET", f"requests?since={since}")["requests"]
        for entry in found:
            entry["body"] = base64.b64decode(entry["body"] or "")
            entry["sent"] = base64.b64decode(entry["sent"] or "")
        return found

    def last_request(self) -> dict[str, Any]:
        return self.requests()[-1]

    def stop(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _control(self, method: str, path: str, body: Any = None) -> Any:
        response = self.http.request(method, f"{self.url}/_simulator/{path}", json=body, timeout=10)
        response.raise_for_status()
        return response.json()


class Gateway:
    """``lmstudio-gateway serve`` with only the given settings, under either server."""

    def __init__(
        self, folder: Path, lmstudio: str, server: str = "gunicorn", **settings: Any
    ) -> None:
        self.server = server
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.unix = str(settings.get("GATEWAY_HOST", "")).partition("unix:")[2]
        self.port = int(settings.pop("GATEWAY_PORT", None) or free_port())
        self.url = f"http://127.0.0.1:{self.port}"
        given = {name: str(value) for name, value in settings.items() if value is not None}
        self.environ = {
            **clean_environ(),
            "LMSTUDIO_BASE_URL": lmstudio,
            "GATEWAY_PORT": str(self.port),
            "STATE_URL": f"sqlite:///{folder}/state.db",
            "WEB_CONCURRENCY": "2",
            **given,
        }
        self.log = folder / "gateway.log"
        self.http = _session()
        self.start()

    def start(self) -> None:
        """Start, and wait until every worker serves."""
        with self.log.open("ab") as log:
            self._ready_before = self._ready()
            self.process = subprocess.Popen(
                self.command(),
                env=self.environ,
                cwd=self.folder,
                stderr=log,
                start_new_session=True,
            )
        eventually(self._is_up, START_TIMEOUT)

    def command(self) -> list[str]:
        return [sys.executable, "-m", "gateway", "serve", "--server", self.server]

    def stop(self, sig: int = signal.SIGTERM) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(sig)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.http.get(self.url + path, **{"timeout": 60, **options})

    def post(self, path: str, body: Any = None, **options: Any) -> requests.Response:
        return self.http.post(self.url + path, json=body, **{"timeout": 60, **options})

    def logged(self) -> str:
        """The log so far, without an incomplete last line."""
        text = self.log.read_bytes()
        return text[: text.rfind(b"\n") + 1].decode()

    def workers(self) -> list[int]:
        """The ids of the worker processes. gevent's server has one process, which is the worker."""
        if self.server == "gevent":
            return [self.process.pid]
        listing = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in listing.split()]

    def processor_time(self) -> float:
        """Seconds that the workers have computed; unlike a clock, it ignores a busy machine."""
        times = [psutil.Process(worker).cpu_times() for worker in self.workers()]
        return float(sum(one.user + one.system for one in times))

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.logged()
        expected = 1 if self.server == "gevent" else int(self.environ["WEB_CONCURRENCY"])
        return self._ready() - self._ready_before >= expected and self._answers()

    def _ready(self) -> int:
        """How many workers have logged that they are ready."""
        return self.logged().count("Worker ready")

    def _answers(self) -> bool:
        family = socket.AF_UNIX if self.unix else socket.AF_INET
        address: Any = self.unix or ("127.0.0.1", self.port)
        with socket.socket(family) as probe:
            return probe.connect_ex(address) == 0


def _session() -> requests.Session:
    session = requests.Session()
    session.trust_env = False
    return session
