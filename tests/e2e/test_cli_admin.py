"""The admin commands: the installed script against a running gateway."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme

from tests.conftest import SdkClient
from tests.processes import (
    Gateway,
    Simulator,
    clean_environ,
    eventually,
    eventually_equal,
    free_port,
)

SCRIPT = str(Path(sys.executable).with_name("lmstudio-gateway"))
QWEN = "qwen2.5-7b-instruct"
SLOW = "llama-3.3-70b-instruct"
#: Milliseconds; such a load never ends before it is cancelled.
ENDLESS = 60_000
NOT_INHERITED = {"REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NO_COLOR", "FORCE_COLOR"}
Launch = Callable[..., Gateway]


class Command:
    """A running ``lmstudio-gateway`` whose output is collected as it is printed."""

    def __init__(self, arguments: tuple[str, ...], environ: dict[str, str], folder: Path) -> None:
        inherited = {
            name: text for name, text in clean_environ().items() if name not in NOT_INHERITED
        }
        self.environ = inherited | {"NO_PROXY": "*", "TERM": "xterm", "COLUMNS": "100"} | environ
        self.out = self.err = b""
        self.terminal: int | None = None
        self._arguments, self._folder = arguments, folder
        self._threads: list[threading.Thread] = []

    def start(self, *, terminal: bool = False) -> Command:
        output = subprocess.PIPE
        if terminal:
            self.terminal, output = pty.openpty()
        self.process = subprocess.Popen(
            [SCRIPT, *self._arguments],
            env=self.environ,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
        )
        if self.terminal is not None:
            os.close(output)
        assert self.process.stderr is not None
        out = self.terminal if self.process.stdout is None else self.process.stdout.fileno()
        assert out is not None
        self._collect("out", out)
        self._collect("err", self.process.stderr.fileno())
        return self

    def interrupt(self) -> Command:
        self.process.send_signal(signal.SIGINT)
        return self

    def finish(self, timeout: float = 60) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        status = self.process.wait(timeout)
        for thread in self._threads:
            thread.join(timeout)
        return status, self.out.decode(), self.err.decode()

    def lines(self) -> list[Any]:
        """The JSON of each whole line of stdout."""
        return [json.loads(line) for line in self.out.splitlines(True) if line.endswith(b"\n")]

    def close(self) -> None:
        self.process.kill()
        self.finish()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        if self.terminal is not None:
            os.close(self.terminal)

    def _collect(self, name: str, descriptor: int) -> None:
        def read() -> None:
            with suppress(OSError):  # EIO: the end of a terminal
                while data := os.read(descriptor, 65536):
                    setattr(self, name, getattr(self, name) + data)

        self._threads.append(threading.Thread(target=read, daemon=True))
        self._threads[-1].start()


Start = Callable[..., Command]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the script in an empty folder, with only the given settings."""
    started: list[Command] = []

    def begin(*arguments: str, terminal: bool = False, **environ: str) -> Command:
        command = Command(arguments, environ, tmp_path)
        started.append(command.start(terminal=terminal))
        return command

    yield begin
    for command in started:
        command.close()


@pytest.fixture
def run(start: Start) -> Run:
    """Runs the script to its end."""
    return lambda *arguments, **options: start(*arguments, **options).finish()


@pytest.fixture
def ask(run: Run, gateway: Gateway) -> Run:
    """Runs the script to its end, with the module's gateway."""
    return lambda *arguments, **options: run(*arguments, GATEWAY_URL=gateway.url, **options)


# Models


def test_models_are_listed_in_tables(ask: Run, gateway: Gateway, simulator: Simulator) -> None:
    gateway.post("/admin/models/load", {"modelKey": QWEN, "instanceId": "one", "ttlSeconds": 90})
    status, out, err = ask("models")
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if line]
    assert rows[0] == ["Active:", QWEN, "as", "one"]
    assert ["one", QWEN, "llm", "4096", "90", "s"] in rows
    assert [QWEN, "llm", "7B", "Q4_K_M", "4.68", "GB", "32768"] in rows
    assert len([row for row in rows if row[1:2] in (["llm"], ["embedding"])]) == 7
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("command", "path"), [("models", "/admin/models"), ("status", "/debug/status")]
)
def test_json_is_the_gateways_own(ask: Run, gateway: Gateway, command: str, path: str) -> None:
    status, out, err = ask(command, "--json")
    assert (status, err) == (0, "")
    assert out == gateway.get(path).text + "\n"


def test_a_load_takes_every_option_and_shows_what_was_applied(
    ask: Run, gateway: Gateway, simulator: Simulator
) -> None:
    options = ["--as", "one", "--context-length", "8192", "--gpu", "0.5", "--cpu-threads", "3"]
    options += ["--ttl", "90", "--set", "flashAttention=true", "--set", "gpu.mainGpu=0"]
    options += ["--set", "gpu.layers=4", "--temperature", "0.5", "--default", "topP=0.9"]
    status, out, err = ask("load", QWEN, *options)
    assert status == 0
    assert err.startswith("Warning: gpu.layers: ")
    progress = [line for line in out.splitlines() if line.startswith(f"Loading {QWEN}: ")]
    assert len(progress) > 3
    assert progress[-1].endswith("100 %")
    assert f"Loaded {QWEN} as one in " in out
    applied = out.partition("Applied: ")[2].split()
    wanted = {"contextLength=8192", "cpuThreads=3", "flashAttention=true", "gpu.ratio=0.5"}
    assert wanted | {"gpu.mainGpu=0"} <= set(applied)
    assert not {"\x1b", "\r"} & set(out)
    listing = gateway.get("/admin/models").json()
    assert listing["active"]["defaultInference"] == {"temperature": 0.5, "topP": 0.9}
    assert listing["loaded"][0]["ttlMs"] == 90_000


def test_a_load_with_no_activate_does_not_activate(ask: Run, gateway: Gateway) -> None:
    status, out, _ = ask("load", QWEN, "--no-activate", "--json")
    assert status == 0
    response = json.loads(out)
    assert (response["status"], response["activated"]) == ("loaded", False)
    assert response["appliedConfig"]["contextLength"] == 4096
    assert gateway.get("/admin/models").json()["active"] is None


def test_in_a_terminal_a_load_has_a_bar(ask: Run) -> None:
    status, out, err = ask("load", QWEN, terminal=True)
    assert (status, err) == (0, "")
    assert "━" in out
    assert "\x1b[2K" in out  # the line is redrawn
    assert "100%" in out
    assert out.count("\n") == 3  # the bar, which stays on its line, and two more lines


def test_ctrl_c_cancels_the_load_in_lm_studio(
    start: Start, gateway: Gateway, simulator: Simulator
) -> None:
    simulator.faults(load_ms=ENDLESS)
    command = start("load", SLOW, GATEWAY_URL=gateway.url)
    eventually(lambda: b"%" in command.out)
    assert [load["outcome"] for load in simulator.state()["loads"]] == ["loading"]
    status, _, err = command.interrupt().finish()
    assert (status, err) == (130, f"Interrupted: the gateway cancels the load of {SLOW}.\n")
    eventually(lambda: simulator.state()["loads"][0]["outcome"] == "cancelled")
    assert gateway.get("/admin/models").json()["loaded"] == []


def test_ctrl_c_restores_the_terminal(start: Start, gateway: Gateway, simulator: Simulator) -> None:
    simulator.faults(load_ms=ENDLESS)
    command = start("load", SLOW, GATEWAY_URL=gateway.url, terminal=True)
    eventually(lambda: b"%" in command.out)
    status, out, err = command.interrupt().finish()
    assert (status, err.count("\n")) == (130, 1)
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l")  # the cursor is visible again


@pytest.mark.parametrize("name", [QWEN, "one"])
def test_unloading_takes_a_key_or_an_instance(
    ask: Run, gateway: Gateway, simulator: Simulator, name: str
) -> None:
    gateway.post("/admin/models/load", {"modelKey": QWEN, "instanceId": "one"})
    status, out, err = ask("unload", name)
    assert (status, err) == (0, "")
    assert out.startswith(f"Unloaded {QWEN}, instance one, in ")
    assert simulator.state()["loaded"] == []


def test_activating_and_deactivating(ask: Run, gateway: Gateway) -> None:
    status, out, err = ask("activate", QWEN, "--instance", "one", "--max-tokens", "64")
    assert (status, err) == (0, "")
    assert out == "Activated: one is used for requests that name no model.\n"
    active = gateway.get("/admin/models").json()["active"]
    assert (active["modelKey"], active["instanceId"]) == (QWEN, "one")
    assert active["defaultInference"] == {"maxTokens": 64}
    assert ask("deactivate", "--json") == (0, '{"status":"deactivated"}\n', "")
    assert gateway.get("/admin/models").json()["active"] is None


# Watching


def test_events_are_printed_as_lines(start: Start, gateway: Gateway) -> None:
    command = start("events", "--types", "model_activate", GATEWAY_URL=gateway.url)
    eventually(lambda: b"connected" in command.out, 30)
    for name in ("[bold]first", "\x1b[31msecond"):
        gateway.post("/admin/models/activate", {"modelKey": name})
    gateway.post("/admin/models/deactivate")
    eventually(lambda: b"second" in command.out, 30)
    status, out, err = command.interrupt().finish()
    assert (status, err) == (130, "")
    connected, first, second = (line.split(maxsplit=2) for line in out.splitlines())
    assert connected[1] == "connected"
    assert first[1:] == ["model_activate", "modelKey=[bold]first"]
    assert second[1:] == ["model_activate", "modelKey=\\x1b[31msecond"]


def test_events_are_coloured_in_a_terminal(start: Start, gateway: Gateway) -> None:
    command = start("events", GATEWAY_URL=gateway.url, terminal=True)
    eventually(lambda: b"connected" in command.out, 30)
    gateway.post("/admin/models/activate", {"modelKey": QWEN})
    eventually(lambda: b"\x1b[32mmodel_activate" in command.out, 30)
    assert command.interrupt().finish()[0] == 130


def test_events_continue_after_the_last_one_when_the_gateway_is_back(
    start: Start, launch: Launch
) -> None:
    gateway = launch()
    command = start("events", "--json", GATEWAY_URL=gateway.url)

    def activated() -> list[str]:
        events = [line for line in command.lines() if line["event"] == "model_activate"]
        return [event["data"]["modelKey"] for event in events]

    eventually(command.lines, 30)
    gateway.post("/admin/models/activate", {"modelKey": "before"})
    eventually(lambda: activated() == ["before"], 30)
    # the command is suspended while the gateway restarts and publishes an event
    command.process.send_signal(signal.SIGSTOP)
    gateway.stop()
    gateway.start()
    gateway.post("/admin/models/activate", {"modelKey": "missed"})
    command.process.send_signal(signal.SIGCONT)
    eventually(lambda: activated() == ["before", "missed"], 30)
    gateway.post("/admin/models/activate", {"modelKey": "after"})
    eventually(lambda: activated() == ["before", "missed", "after"], 30)
    status, _, err = command.interrupt().finish()
    assert status == 130
    lost, back = err.splitlines()
    assert lost.endswith("Reconnecting …")
    assert back.startswith("Reconnected; continuing after event ")
    assert [line["event"] for line in command.lines()].count("connected") == 2
    ids = [int(line["id"]) for line in command.lines()]
    assert ids == sorted(ids)


def test_status_shows_the_health_of_each_part(
    ask: Run, gateway: Gateway, simulator: Simulator
) -> None:
    gateway.post("/admin/models/activate", {"modelKey": QWEN})
    eventually_equal(lambda: ids_in_flight(gateway), [])
    status, out, err = ask("status")
    assert (status, err) == (0, "")
    pairs = [line.split(": ", 1) for line in out.splitlines()]
    shown = {name: text.strip() for name, text in pairs}
    assert shown["Gateway"].startswith(f"{gateway.url}, version ")
    assert shown["LM Studio"] == shown["State"] == "connected"
    assert (shown["Active"], shown["Now"]) == (QWEN, "idle, 0 in flight")
    simulator.faults(silent_http=True)
    assert "LM Studio: not connected: " in ask("status")[1]


def ids_in_flight(gateway: Gateway) -> list[str | None]:
    """The request ids of the operations in flight; None for a load."""
    return [one.get("requestId") for one in gateway.get("/debug/status").json()["inFlight"]]


@pytest.fixture
def in_flight(gateway: Gateway, simulator: Simulator) -> Iterator[str]:
    """The request id of an exchange that stays in flight until the test ends."""
    body = {"model": QWEN, "stream": True, "messages": [{"role": "user", "content": "count to 9"}]}
    headers = {"X-Simulator-Fault": "silent-stream", "X-Request-Id": "req-in-flight"}
    url = f"{gateway.url}/v1/chat/completions"
    with requests.post(url, json=body, headers=headers, stream=True, timeout=60) as response:
        assert response.status_code == 200
        # earlier operations are no longer in flight either
        eventually_equal(lambda: ids_in_flight(gateway), ["req-in-flight"])
        yield "req-in-flight"


def test_top_once_shows_what_is_in_flight(ask: Run, in_flight: str) -> None:
    status, out, err = ask("top", "--once", "--interval", "0.2")
    assert (status, err) == (0, "")
    assert " requests/s, " in out
    assert "\nActive: none\n" in out
    assert "1 in flight (processing_inference)" in out
    (row,) = [line.split() for line in out.splitlines() if line.startswith(in_flight)]
    assert row[1:4] == ["-", "/v1/chat/completions", QWEN]
    assert float(row[4]) >= 0
    assert "\x1b" not in out


def test_top_uses_the_alternate_screen(start: Start, gateway: Gateway, in_flight: str) -> None:
    command = start("top", "--interval", "0.2", GATEWAY_URL=gateway.url, terminal=True)
    eventually(lambda: command.out.count(in_flight.encode()) >= 2, 30)
    status, out, err = command.interrupt().finish()
    assert (status, err) == (130, "")
    assert out.index("\x1b[?1049h") < out.index(in_flight) < out.rindex("\x1b[?1049l")


# Errors and exit statuses


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["load", "no-such-model"], "Error: Model not found: no-such-model (404, request "),
        (["load", "deepseek-r1-671b"], "insufficient memory"),
        (["load", QWEN, "--set", "contxtLength=1"], "  loadConfig.contxtLength: Unknown field"),
        (["load", QWEN, "--set", "gpu.layers=5"], "  loadConfig.gpu.layers: "),
        (["unload", "nothing"], "Error: Model not loaded: nothing (404, request "),
        (["events", "--types", "nothing"], "Unknown event type 'nothing'"),
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_an_error_of_the_gateway_is_status_1(
    ask: Run, arguments: list[str], words: str, form: list[str]
) -> None:
    status, out, err = ask(*arguments, *form)
    assert status == 1
    progress = [line for line in out.splitlines() if line.startswith("Loading ")]
    assert out.splitlines() == ([] if form else progress)
    assert words in err
    assert ", request req_" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["load"],
        ["load", QWEN, "--context-length", "much"],
        ["load", QWEN, "--set", "seed"],
        ["load", QWEN, "--gpu", "max", "--set", "gpu.ratio=1"],
        ["activate", QWEN, "--default", "topP"],
        ["top", "--interval", "0"],
        ["models", "--url", "gateway:8002"],
    ],
)
def test_wrong_usage_is_status_2(run: Run, arguments: list[str]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "Error: " in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [["models"], ["load", QWEN], ["unload", QWEN], ["events"], ["status"], ["top"]],
)
def test_no_gateway_is_status_3(run: Run, arguments: list[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    status, out, err = run(*arguments, GATEWAY_URL=url)
    assert (status, out) == (3, "")
    (line,) = err.splitlines()
    assert line.startswith(f"Error: The gateway at {url} can't be reached: ")
    assert "Connection refused" in line


def test_a_gateway_that_dies_during_a_load_is_status_3(
    start: Start, launch: Launch, simulator: Simulator
) -> None:
    gateway = launch()
    simulator.faults(load_ms=ENDLESS)
    command = start("load", SLOW, GATEWAY_URL=gateway.url)
    eventually(lambda: b"%" in command.out)
    os.killpg(gateway.process.pid, signal.SIGKILL)
    status, _, err = command.finish()
    assert status == 3
    assert err.startswith("Error: The gateway ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("key", "status_code"), [("", 401), ("wrong-key-123", 401), (SdkClient.KEY, 403)]
)
def test_a_missing_or_insufficient_key_is_status_4(
    run: Run, strict: Gateway, key: str, status_code: int
) -> None:
    for command in (["models"], ["load", QWEN], ["events"]):
        status, out, err = run(*command, GATEWAY_URL=strict.url, GATEWAY_API_KEY=key)
        assert (status, out) == (4, "")
        assert f"({status_code}, request " in err
        assert not key or key not in err


def test_the_key_comes_from_the_environment_or_the_servers_env_file(
    run: Run, strict: Gateway, tmp_path: Path
) -> None:
    assert run("status", GATEWAY_URL=strict.url, GATEWAY_ADMIN_KEY=SdkClient.ADMIN_KEY)[0] == 0
    assert run("status", "--url", strict.url, "--key", SdkClient.ADMIN_KEY)[0] == 0
    settings = [f"GATEWAY_PORT={strict.port}", f"GATEWAY_API_KEY=app:{SdkClient.KEY},old:other"]
    (tmp_path / ".env").write_text("\n".join(settings))
    assert run("models")[0] == 4  # the first key of the list, which is only for inference
    settings.append(f"GATEWAY_ADMIN_KEY=ops:{SdkClient.ADMIN_KEY}")
    (tmp_path / ".env").write_text("\n".join(settings))
    assert run("models")[0] == 0


def test_a_netrc_does_not_replace_the_key(run: Run, strict: Gateway, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2\n")
    netrc.chmod(0o600)
    keys = {"GATEWAY_ADMIN_KEY": SdkClient.ADMIN_KEY, "NETRC": str(netrc)}
    assert run("models", GATEWAY_URL=strict.url, **keys)[0] == 0


def test_https_is_verified(run: Run, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued = authority.issue_cert("localhost")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    # the simulator is no gateway, but has a certificate; its response shows that it was reached
    server = Simulator(0, "--tls-cert", str(certificate), "--tls-key", str(key))
    url = f"https://localhost:{server.port}"
    try:
        status, _, err = run("models", GATEWAY_URL=url)
        assert (status, "certificate verify failed" in err) == (3, True)
        assert "REQUESTS_CA_BUNDLE" in err
        trusting = {"GATEWAY_URL": url, "REQUESTS_CA_BUNDLE": str(tmp_path / "ca.pem")}
        status, out, err = run("models", "--json", **trusting)
        assert (status, out) == (1, "")
        assert "This is not a gateway's response: " in err
        trusting["REQUESTS_CA_BUNDLE"] = str(tmp_path / "missing.pem")
        assert run("models", **trusting)[0] == 3
    finally:
        server.stop()
