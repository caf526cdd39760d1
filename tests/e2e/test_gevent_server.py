"""``serve --server gevent``: shutting down, Unix sockets, and systems without POSIX."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_cancellation import assert_cancelled, chat, connect, read_until, running
from tests.processes import Gateway, Simulator, eventually

ROOT = Path(__file__).parents[2]
MODEL = "qwen2-1.5b-instruct"
#: Runs the server much as on Windows: gevent's libuv loop, and nothing that Python lacks there.
_WITHOUT_POSIX = """
# these fail to import without the attributes removed below
import _socket, asyncio, platform, select, signal, socket, subprocess, sys
platform.platform()  # caches the result; it runs a program, which only happens on Linux
for module in ("grp", "gunicorn", "gunicorn.app.base", "pwd", "resource", "termios"):
    sys.modules[module] = None
sys.modules["trio"] = None  # selenium installs it; httpcore would import it, which needs POSIX
for module, names in {
    select: ["poll", "epoll", "POLLHUP", "POLLERR", "POLLRDHUP", "POLLIN", "POLLOUT"],
    signal: ["SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGALRM"],
    _socket: ["AF_UNIX", "MSG_DONTWAIT", "socketpair"],
    socket: ["AF_UNIX", "MSG_DONTWAIT", "SO_REUSEPORT"],
}.items():
    for name in names:
        delattr(module, name)
socket.__all__ = [name for name in socket.__all__ if hasattr(socket, name)]
from gateway.commands import main
main(["serve", "--server", "gevent"])
"""
#: Runs the server with a grace period of 4 s.
_SHORT_GRACE = """
from gevent import monkey
monkey.patch_all()
from gateway.serving import launch
launch.GRACEFUL_TIMEOUT = 4
launch.serve_gevent(launch.checked_settings_or_exit())
"""


class Scripted(Gateway):
    """A gateway that a Python script starts."""

    def __init__(self, folder: Path, lmstudio: str, script: str, **settings: Any) -> None:
        self.script = script
        super().__init__(folder, lmstudio, "gevent", PYTHONPATH=ROOT, **settings)

    def command(self) -> list[str]:
        return [sys.executable, "-c", self.script]


@pytest.fixture(scope="module")
def without_posix(
    shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway on a system without POSIX."""
    folder = tmp_path_factory.mktemp("without-posix")
    gateway = Scripted(folder, shared_simulator.url, _WITHOUT_POSIX, GEVENT_LOOP="libuv")
    yield gateway
    gateway.stop()
    assert "Traceback" not in gateway.logged()


# Without POSIX


def test_a_model_loads_and_chats_without_posix(
    without_posix: Gateway, simulator: Simulator, listen: Callable[..., Any]
) -> None:
    reader = listen(without_posix)
    loaded = without_posix.post("/admin/models/load", {"modelKey": MODEL})
    assert loaded.status_code == 200, loaded.text
    body = {"messages": [{"role": "user", "content": "count to 3"}]}
    assert "1 2 3 " in without_posix.post("/v1/chat/completions", body).text
    with without_posix.post(
        "/v1/chat/completions", {**body, "stream": True}, stream=True
    ) as stream:
        assert b"[DONE]" in stream.content
    reader.until("inference_complete", 2)
    assert reader.of("model_load_complete")
    assert without_posix.get("/debug/metrics").json()["system"]["memoryUsage"] == {"rss": None}
    assert without_posix.get("/debug/status").json()["inFlight"] == []
    assert without_posix.get("/metrics").status_code == 200
    assert without_posix.get("/health").json()["status"] == "ok"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_ends_its_exchange_without_posix(
    without_posix: Gateway, simulator: Simulator, stream: bool
) -> None:
    client = connect(without_posix.port)
    client.sendall(chat(stream, {"X-Simulator-Prefill-Ms": "60000"}))
    eventually(running(simulator))
    disconnected = time.time()
    client.close()
    assert_cancelled(simulator, disconnected)


def test_a_unix_socket_is_a_clear_error_without_posix(tmp_path: Path) -> None:
    environ = {"PYTHONPATH": str(ROOT), "GATEWAY_HOST": f"unix:{tmp_path}/s"}
    environ["STATE_URL"] = f"sqlite:///{tmp_path}/state.db"
    completed = subprocess.run(
        [sys.executable, "-c", _WITHOUT_POSIX],
        env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert completed.returncode == 1
    (line,) = completed.stderr.splitlines()
    assert line.startswith("GATEWAY_HOST: ")


# Shutting down


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stream_that_outlasts_the_grace_period_gets_an_error_event(
    simulator: Simulator, tmp_path: Path, number: signal.Signals
) -> None:
    gateway = Scripted(tmp_path, simulator.url, _SHORT_GRACE)
    with connect(gateway.port) as client:
        client.settimeout(30)
        client.sendall(chat(True, {"X-Simulator-Pace-Ms": "50"}))
        read_until(client, b'"content":"2 "')
        gateway.process.send_signal(number)
        received = read_until(client, b'data: {"error"')
        assert b"[DONE]" not in received
    assert gateway.process.wait(20) == 0


def test_an_idle_connection_is_closed_on_shutdown(simulator: Simulator, tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, simulator.url, "gevent")
    assert gateway.get("/health").status_code == 200
    with socket.create_connection(("127.0.0.1", gateway.port), 20) as idle:
        gateway.process.send_signal(signal.SIGTERM)
        assert idle.recv(1) == b""
    assert gateway.process.wait(20) == 0


def test_a_stale_unix_socket_is_replaced_and_removed_on_shutdown(
    simulator: Simulator, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    gateway = Gateway(tmp_path / "g", simulator.url, "gevent", GATEWAY_HOST=f"unix:{path}")
    gateway.stop()
    assert not path.exists()
