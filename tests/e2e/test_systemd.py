"""deploy/lmstudio-gateway.service: what systemd says of it, and what it takes for granted of us."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.serving.launch import GRACEFUL_TIMEOUT
from gateway.settings import TABLE
from tests.nginx import require
from tests.processes import Gateway, Simulator

UNIT = Path(__file__).parents[2] / "deploy" / "lmstudio-gateway.service"
INSTALLED = "/opt/lmstudio-gateway/bin/lmstudio-gateway"
#: Exposure by systemd's own reckoning, times 10, of 100; below is better.
MOST_EXPOSED = 20
#: prctl's PR_SET_MDWE, which is what MemoryDenyWriteExecute= means on new kernels.
_DENY = "import ctypes; denied = ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0"


def values(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


@pytest.fixture
def analyze(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """systemd-analyze of the unit, with the program where it is here."""
    program = require("systemd-analyze")
    here = shutil.which("lmstudio-gateway", path=f"{Path(sys.executable).parent}:{os.defpath}")
    text = UNIT.read_text()
    assert text.count(f"ExecStart={INSTALLED} ") == 1
    unit = tmp_path / UNIT.name
    unit.write_text(text.replace(f"ExecStart={INSTALLED} ", f"ExecStart={here} "))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [program, *arguments, str(unit)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    return run


def test_systemd_finds_no_fault(analyze: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = analyze("verify", "--man=no")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_it_is_little_exposed(analyze: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED}", "--no-pager")
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze is older than 250")
    assert done.returncode == 0, done.stdout


def test_it_gives_streams_the_time_that_the_gateway_does() -> None:
    (limit,) = values("TimeoutStopSec")
    assert GRACEFUL_TIMEOUT + 5 <= int(limit) <= GRACEFUL_TIMEOUT + 30
    assert values("KillMode") == ["mixed"]


def test_it_names_real_settings() -> None:
    known = {setting.variable for setting in TABLE}
    assert {value.partition("=")[0] for value in values("Environment")} <= known
    assert set(re.findall(r"\b([A-Z]+(?:_[A-Z]+)+)=", UNIT.read_text())) <= known


def test_gunicorn_says_when_it_listens(simulator: Simulator, tmp_path: Path) -> None:
    """``Type=notify``"""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(path))
        systemd.settimeout(30)
        gateway = Gateway(tmp_path, simulator.url, WEB_CONCURRENCY=1, NOTIFY_SOCKET=path)
        try:
            assert b"READY=1" in systemd.recv(4096).splitlines()
        finally:
            gateway.stop()


class Denied(Gateway):
    """A gateway that may have no memory that is both written and executed."""

    def command(self) -> list[str]:
        script = (
            f"{_DENY}; import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        )
        return [sys.executable, "-c", script, *super().command()[1:]]


def test_it_runs_without_memory_that_is_written_and_executed(
    simulator: Simulator, tmp_path: Path
) -> None:
    """``MemoryDenyWriteExecute``"""
    asked = [sys.executable, "-c", f"{_DENY}; raise SystemExit(not denied)"]
    if subprocess.run(asked, check=False).returncode:
        pytest.skip("this kernel does not know PR_SET_MDWE")
    gateway = Denied(tmp_path, simulator.url, WEB_CONCURRENCY=1)
    try:
        model = {"modelKey": "qwen2-1.5b-instruct"}
        assert gateway.post("/admin/models/load", model).status_code == 200
        body = {"messages": [{"role": "user", "content": "count to 3"}], "stream": True}
        assert "[DONE]" in gateway.post("/v1/chat/completions", body).text
        assert gateway.get("/debug/metrics").status_code == 200
    finally:
        gateway.stop()
