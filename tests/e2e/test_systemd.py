"""deploy/lmstudio-gateway.service: systemd accepts it, and the gateway fits it."""

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
#: The highest acceptable exposure on the scale of systemd-analyze, times 10 (0 to 100).
MAX_EXPOSURE = 20
#: Sets PR_SET_MDWE with prctl(2), as systemd does for MemoryDenyWriteExecute= on new kernels.
_DENY = "import ctypes; denied = ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0"


def values(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


@pytest.fixture
def analyze(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs systemd-analyze on the unit, with the path of the installed program."""
    program = require("systemd-analyze")
    installed = shutil.which("lmstudio-gateway", path=f"{Path(sys.executable).parent}:{os.defpath}")
    text = UNIT.read_text()
    assert text.count(f"ExecStart={INSTALLED} ") == 1
    unit = tmp_path / UNIT.name
    unit.write_text(text.replace(f"ExecStart={INSTALLED} ", f"ExecStart={installed} "))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [program, *arguments, str(unit)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    return run


def test_systemd_accepts_the_unit(analyze: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = analyze("verify", "--man=no")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_its_exposure_is_low(analyze: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = analyze("security", "--offline=true", f"--threshold={MAX_EXPOSURE}", "--no-pager")
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze is older than 250")
    assert done.returncode == 0, done.stdout


def test_its_stop_timeout_covers_the_grace_period() -> None:
    (limit,) = values("TimeoutStopSec")
    assert GRACEFUL_TIMEOUT + 5 <= int(limit) <= GRACEFUL_TIMEOUT + 30
    assert values("KillMode") == ["mixed"]


def test_it_uses_existing_settings() -> None:
    known = {setting.variable for setting in TABLE}
    assert {value.partition("=")[0] for value in values("Environment")} <= known
    assert set(re.findall(r"\b([A-Z]+(?:_[A-Z]+)+)=", UNIT.read_text())) <= known


def test_gunicorn_notifies_systemd_once_it_listens(simulator: Simulator, tmp_path: Path) -> None:
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
    """A gateway that must not have memory that is both writable and executable."""

    def command(self) -> list[str]:
        script = (
            f"{_DENY}; import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        )
        return [sys.executable, "-c", script, *super().command()[1:]]


def test_it_runs_without_memory_that_is_writable_and_executable(
    simulator: Simulator, tmp_path: Path
) -> None:
    """``MemoryDenyWriteExecute``"""
    command = [sys.executable, "-c", f"{_DENY}; raise SystemExit(not denied)"]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("this kernel lacks PR_SET_MDWE")
    gateway = Denied(tmp_path, simulator.url, WEB_CONCURRENCY=1)
    try:
        model = {"modelKey": "qwen2-1.5b-instruct"}
        assert gateway.post("/admin/models/load", model).status_code == 200
        body = {"messages": [{"role": "user", "content": "count to 3"}], "stream": True}
        assert "[DONE]" in gateway.post("/v1/chat/completions", body).text
        assert gateway.get("/debug/metrics").status_code == 200
    finally:
        gateway.stop()
