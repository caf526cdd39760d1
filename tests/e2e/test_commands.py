"""The commands: their exit statuses and output, and that they clean up after themselves."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.processes import Gateway, Simulator, clean_environ, eventually, free_port

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "gateway"]
GEVENT = [*CLI, "serve", "--server", "gevent"]
GUNICORN = [sys.executable, "-m", "gunicorn", "wsgi:app"]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts commands with only the given settings; they are killed when the test ends."""
    running: list[subprocess.Popen[str]] = []

    def begin(
        command: list[str], *, cwd: Path | None = None, **settings: Any
    ) -> subprocess.Popen[str]:
        (tmp_path / "temporary").mkdir(exist_ok=True)
        environ = clean_environ()
        environ |= {"TMPDIR": str(tmp_path / "temporary"), "PYTHONUNBUFFERED": "1"}
        environ |= {"STATE_URL": f"sqlite:///{tmp_path}/state.db", "WEB_CONCURRENCY": "1"}
        process = subprocess.Popen(
            command,
            cwd=cwd or tmp_path,
            env=environ | {name: str(value) for name, value in settings.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.communicate(timeout=10)


def finish(process: subprocess.Popen[str], timeout: float = 60) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def have_exited(processes: list[psutil.Process]) -> bool:
    return not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes
    )


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False


# check


def test_check_succeeds_when_everything_works(start: Start, simulator: Simulator) -> None:
    status, out, err = finish(start([*CLI, "check"], LMSTUDIO_BASE_URL=simulator.url))
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "ok    settings",
        "ok    state",
        "ok    LM Studio HTTP",
        "ok    LM Studio SDK",
    ]
    assert lines[0].startswith("ok    settings: valid (there is no /")
    assert "7 models" in lines[-1]


def test_check_warns_of_a_dotenv_that_others_can_read(
    start: Start, simulator: Simulator, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("GATEWAY_PORT=8002\n")
    (tmp_path / ".env").chmod(0o644)
    check = start([*CLI, "check"], cwd=tmp_path, LMSTUDIO_BASE_URL=simulator.url)
    status, out, err = finish(check)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1].startswith("warn  .env: ")


def test_check_names_what_fails(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    nowhere = {
        "LMSTUDIO_BASE_URL": f"http://127.0.0.1:{free_port()}",
        "STATE_URL": f"sqlite:///{tmp_path}/file/state.db",
        "SDK_RETRY_DELAY": 10,
    }
    status, out, err = finish(start([*CLI, "check"], **nowhere))
    assert status == 1
    lines = out.splitlines()
    assert [line[:5].strip() for line in lines] == ["ok", "FAIL", "FAIL", "FAIL"]
    assert nowhere["LMSTUDIO_BASE_URL"] in lines[-2]
    assert "after 3 attempts" in lines[-1]
    assert "Traceback" not in err


def test_check_connects_to_redis(start: Start, simulator: Simulator) -> None:
    away = {"STATE_URL": f"redis://:hunter2@127.0.0.1:{free_port()}"}
    status, out, err = finish(start([*CLI, "check"], LMSTUDIO_BASE_URL=simulator.url, **away))
    assert (status, err) == (1, "")
    assert [line[:5].strip() for line in out.splitlines()] == ["ok", "FAIL", "ok", "ok"]
    assert "hunter2" not in out


# Bad settings


@pytest.mark.parametrize(
    ("command", "cwd"),
    [([*CLI, "serve"], None), (GEVENT, None), ([*CLI, "check"], None), (GUNICORN, ROOT)],
    ids=["serve", "gevent", "check", "gunicorn"],
)
def test_bad_settings_are_one_line_each_and_status_1(
    start: Start, command: list[str], cwd: Path | None
) -> None:
    bad = {"GATEWAY_PORT": "x", "LMSTUDIO_API_TOKEN": "hunter2", "LOG_LEVEL": "loud"}
    status, out, err = finish(start(command, cwd=cwd, **bad))
    assert status == 1
    assert [line.partition(":")[0] for line in err.splitlines()] == [
        "LMSTUDIO_API_TOKEN",
        "GATEWAY_PORT",
        "LOG_LEVEL",
    ]
    assert "hunter2" not in out + err


@pytest.mark.parametrize(
    "settings",
    [
        {"GATEWAY_HOST": "0.0.0.0"},
        {"GATEWAY_HOST": "0.0.0.0", "GATEWAY_API_KEY": "change-me-please"},
    ],
)
def test_an_unsafe_configuration_does_not_start(start: Start, settings: dict[str, str]) -> None:
    status, _, err = finish(start([*CLI, "serve"], **settings))
    assert status == 1
    (line,) = err.splitlines()
    assert line.startswith("GATEWAY_API_KEY: ")


def test_a_state_that_cannot_be_opened_is_an_error_without_a_traceback(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    state = f"sqlite:///{tmp_path}/file/state.db"
    status, _, err = finish(start([*CLI, "serve"], STATE_URL=state, GATEWAY_PORT=free_port()))
    assert status != 0
    assert "file/state.db" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", [[*CLI, "serve"], GEVENT], ids=["gunicorn", "gevent"])
def test_a_port_in_use_is_an_error_without_a_traceback(
    start: Start, simulator: Simulator, command: list[str]
) -> None:
    status, _, err = finish(start(command, GATEWAY_PORT=simulator.port))
    assert status != 0
    assert str(simulator.port) in err
    assert "Traceback" not in err


# Serving


def test_gunicorn_serves_the_checkout(start: Start, simulator: Simulator) -> None:
    port = free_port()
    gateway = start(GUNICORN, cwd=ROOT, GATEWAY_PORT=port, LMSTUDIO_BASE_URL=simulator.url)
    eventually(lambda: answers(f"http://127.0.0.1:{port}/health"), 30)
    gateway.terminate()
    status, _, err = finish(gateway)
    assert status == 0
    assert "Traceback" not in err


def test_an_empty_number_of_workers_is_the_default(start: Start, simulator: Simulator) -> None:
    """Docker's env_file sets it so from .env.example."""
    port = free_port()
    gateway = start(
        [*CLI, "serve"],
        GATEWAY_PORT=port,
        LMSTUDIO_BASE_URL=simulator.url,
        WEB_CONCURRENCY="",
    )
    eventually(lambda: answers(f"http://127.0.0.1:{port}/health"), 30)
    gateway.terminate()
    assert finish(gateway)[0] == 0


@pytest.mark.both_servers
def test_a_gateway_that_is_stopped_while_it_boots_exits_soon(
    launch: Callable[..., Gateway],
) -> None:
    gateway = launch(WEB_CONCURRENCY=1)
    gateway.process.terminate()
    assert gateway.process.wait(15) == 0


def test_simulate_prints_its_url(start: Start) -> None:
    simulator = start([*CLI, "simulate", "--port", "0"])
    assert simulator.stdout is not None
    line = simulator.stdout.readline().strip()
    url = line.rpartition(" ")[2]
    assert line == f"LM Studio simulator listening on {url}"
    assert requests.get(f"{url}/lmstudio-greeting", timeout=10).json() == {"lmstudio": True}
    simulator.terminate()
    assert finish(simulator)[0] == 0


def test_simulate_on_a_port_in_use_is_an_error_without_a_traceback(
    start: Start, simulator: Simulator
) -> None:
    status, out, err = finish(start([*CLI, "simulate", "--port", str(simulator.port)]))
    assert (status, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("Error: The simulator can't start: ")
    assert "already in use" in line


# The demo


def test_the_demo_tours_once_and_cleans_up(start: Start, tmp_path: Path) -> None:
    # the demo must not use the user's own settings
    own = {"GATEWAY_API_KEY": "mine", "LMSTUDIO_BASE_URL": "http://127.0.0.1:9"}
    status, out, err = finish(start([*CLI, "demo", "--once"], **own), 90)
    assert (status, err) == (0, "")
    for words in ("GET /admin/models", "qwen2.5-7b-instruct", "loaded as primary", "100.0%"):
        assert words in out
    assert "simulator speaking" in out
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_demo_exits_cleanly_on_a_signal(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    demo = start([*CLI, "demo"])
    assert demo.stdout is not None
    for line in demo.stdout:
        if "Ctrl-C" in line:
            break
    children = psutil.Process(demo.pid).children(recursive=True)
    assert len(children) >= 3  # simulator, master, workers
    demo.send_signal(number)
    status, out, err = finish(demo, 30)
    assert (status, err) == (0, "")
    assert "Stopped." in out
    eventually(lambda: have_exited(children))
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_demo_exits_cleanly_while_it_starts(start: Start, tmp_path: Path) -> None:
    demo = start([*CLI, "demo"])
    eventually(lambda: len(psutil.Process(demo.pid).children(recursive=True)) >= 2, 30)
    children = psutil.Process(demo.pid).children(recursive=True)
    demo.terminate()
    _, _, err = finish(demo, 45)
    assert "Traceback" not in err
    eventually(lambda: have_exited(children))
    assert list((tmp_path / "temporary").iterdir()) == []
