"""``serve --server gevent``: its end, its sockets, and that it runs where there is no POSIX."""

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
#: The server as Windows would have it, as far as Linux can show it: gevent's other event loop, and
#: nothing of what Python lacks there.
_WITHOUT_POSIX = """
# they would not import without all that
import _socket, asyncio, platform, select, signal, socket, subprocess, sys
platform.platform()  # runs a program, which only Linux does
for module in ("grp", "gunicorn", "gunicorn.app.base", "pwd", "resource", "termios"):
    sys.modules[module] = None
sys.modules["trio"] = None  # selenium's; httpcore would import it, which runs a program on Linux
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
#: A grace period of 4 s.
_HASTY = """
from gevent import monkey
monkey.patch_all()
from gateway.serving import launch as server
server.GRACEFUL_TIMEOUT = 4
server.serve_gevent(server.checked_settings_or_exit())
"""


class Scripted(Gateway):
    """A gateway of a script's own."""

    def __init__(self, folder: Path, lmstudio: str, script: str, **settings: Any) -> None:
        self.script = script
        super().__init__(folder, lmstudio, "gevent", PYTHONPATH=ROOT, **settings)

    def command(self) -> list[str]:
        return [sys.executable, "-c", self.script]


@pytest.fixture(scope="module")
def bare(
    shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway without POSIX."""
    folder = tmp_path_factory.mktemp("bare")
    gateway = Scripted(folder, shared_simulator.url, _WITHOUT_POSIX, GEVENT_LOOP="libuv")
    yield gateway
    gateway.stop()
    assert "Traceback" not in gateway.logged()


# Without POSIX


def test_a_model_is_loaded_and_answers_without_posix(
    bare: Gateway, simulator: Simulator, listen: Callable[..., Any]
) -> None:
    reader = listen(bare)
    loaded = bare.post("/admin/models/load", {"modelKey": MODEL})
    assert loaded.status_code == 200, loaded.text
    body = {"messages": [{"role": "user", "content": "count to 3"}]}
    assert "1 2 3 " in bare.post("/v1/chat/completions", body).text
    with bare.post("/v1/chat/completions", {**body, "stream": True}, stream=True) as stream:
        assert b"[DONE]" in stream.content
    reader.until("inference_complete", 2)
    assert reader.of("model_load_complete")
    assert bare.get("/debug/metrics").json()["system"]["memoryUsage"] == {"rss": None}
    assert bare.get("/debug/status").json()["inFlight"] == []
    assert bare.get("/metrics").status_code == 200
    assert bare.get("/health").json()["status"] == "ok"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_exchange_without_posix(
    bare: Gateway, simulator: Simulator, stream: bool
) -> None:
    client = connect(bare.port)
    client.sendall(chat(stream, {"X-Simulator-Prefill-Ms": "60000"}))
    eventually(running(simulator))
    left = time.time()
    client.close()
    assert_cancelled(simulator, left)


def test_a_unix_socket_is_refused_in_words_without_posix(tmp_path: Path) -> None:
    environ = {"PYTHONPATH": str(ROOT), "GATEWAY_HOST": f"unix:{tmp_path}/s"}
    environ["STATE_URL"] = f"sqlite:///{tmp_path}/state.db"
    ended = subprocess.run(
        [sys.executable, "-c", _WITHOUT_POSIX],
        env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("GATEWAY_HOST: ")


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stream_beyond_the_grace_period_is_told_so(
    simulator: Simulator, tmp_path: Path, number: signal.Signals
) -> None:
    gateway = Scripted(tmp_path, simulator.url, _HASTY)
    with connect(gateway.port) as client:
        client.settimeout(30)
        client.sendall(chat(True, {"X-Simulator-Pace-Ms": "50"}))
        read_until(client, b'"content":"2 "')
        gateway.process.send_signal(number)
        told = read_until(client, b'data: {"error"')
        assert b"[DONE]" not in told
    assert gateway.process.wait(20) == 0


def test_an_idle_connection_is_closed_at_the_end(simulator: Simulator, tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, simulator.url, "gevent")
    assert gateway.get("/health").status_code == 200
    with socket.create_connection(("127.0.0.1", gateway.port), 20) as never_asked:
        gateway.process.send_signal(signal.SIGTERM)
        assert never_asked.recv(1) == b""
    assert gateway.process.wait(20) == 0


def test_a_unix_socket_is_taken_over_and_goes_with_the_server(
    simulator: Simulator, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    gateway = Gateway(tmp_path / "g", simulator.url, "gevent", GATEWAY_HOST=f"unix:{path}")
    gateway.stop()
    assert not path.exists()
