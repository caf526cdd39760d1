"""Every code block of README.rst works as it is written, against a real gateway."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from gateway.settings import load
from tests.processes import Gateway, Simulator, eventually, free_port
from tests.readme import ROOT, Block, blocks, replaced

KEY, ADMIN = "inference-key-0123456789", "admin-key-0123456789abc"
MODEL = "qwen2.5-7b-instruct"
BLOCKS = blocks()
TIMEOUT = 60.0

#: Commands that are safe to run on a developer's machine. A block with any other is not run.
SAFE = re.compile(
    r"(cp \.env\.example \.env|npm install openai|export [A-Z_]+=|curl |python3 -c |"
    r"lmstudio-gateway (check|serve|simulate|load|models|status)\b)"
)
#: The beginning of a line in each block that is not run, and the reason.
NOT_RUN = {
    "python3 -m venv ": "takes a minute; tests/newcomer runs it",
    "pip install . && ": "takes a minute; tests/newcomer runs it",
    "pip install '.[test]' && pytest": "runs this very test; .ci/run begins with it",
}
#: Commands that run until they are stopped, and output that shows that they work.
ENDLESS = {
    "lmstudio-gateway simulate": "listening on",
    "lmstudio-gateway serve": "Worker ready",
    "curl -N -H 'Authorization: Bearer YOUR-ADMIN-KEY' http://127.0.0.1:8002/debug/stream": (
        "event: connected"
    ),
}
#: Patterns that the output of some commands must match; the others must only succeed.
PRINTS = {
    "lmstudio-gateway check": "ok    LM Studio SDK",
    "curl http://127.0.0.1:8002/health": '"status": ?"ok"',
    "curl http://127.0.0.1:8002/v1/chat/completions": r"(?s)There is no model.*\[DONE\].*qwen2",
    "curl -N http://127.0.0.1:8002/v1/chat/completions": r"\[DONE\]",
    "curl -N http://127.0.0.1:8002/admin/models/load": "(?s)_progress.*event: model_load_complete",
    "lmstudio-gateway load": "Loaded qwen2.5-7b-instruct",
    "from openai import OpenAI": "(?s)There is no model.*There is no model",
    'import OpenAI from "openai"': "There is no model",
    "from anthropic import Anthropic": "There is no model",
    "python3 -c 'from openai import OpenAI": MODEL,
}


@pytest.fixture(scope="module")
def guarded(
    shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    gateway = Gateway(
        tmp_path_factory.mktemp("guarded"),
        shared_simulator.url,
        GATEWAY_API_KEY=f"app:{KEY}",
        GATEWAY_ADMIN_KEY=f"ops:{ADMIN}",
        WEB_CONCURRENCY=1,
    )
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the module's blocks run in turn, as in a reader's terminal."""
    made = tmp_path_factory.mktemp("reader")
    shutil.copy(ROOT / ".env.example", made)
    # curl fails on an HTTP error, and does not hang
    (made / ".curlrc").write_text("fail-with-body\nmax-time = 60\n")
    return made


@pytest.fixture
def table(guarded: Gateway, simulator: Simulator) -> dict[str, str]:
    """Text of README.rst → its replacement in this test."""
    return {
        "http://127.0.0.1:8002": guarded.url,
        "http://192.168.1.10:8002": guarded.url,
        '"127.0.0.1:8002"': f'"127.0.0.1:{guarded.port}"',
        "http://127.0.0.1:1234": simulator.url,
        "simulate --port 1234": "simulate --port 0",
        "YOUR-KEY": KEY,
        "YOUR-ADMIN-KEY": ADMIN,
    }


@pytest.fixture
def environ(guarded: Gateway, simulator: Simulator, folder: Path) -> dict[str, str]:
    """The environment of a reader whose settings are those of the gateway."""
    binaries = str(Path(sys.executable).parent)
    return {
        **guarded.environ,
        "GATEWAY_URL": guarded.url,
        "GATEWAY_PORT": str(free_port()),  # for the gateway that a block starts
        "STATE_URL": f"sqlite:///{folder}/state.db",
        "CURL_HOME": str(folder),
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "NO_PROXY": "*",
    }


def is_run(block: Block) -> bool:
    return block.language == "bash" and not any(
        line.startswith(start) for line in block.commands() for start in NOT_RUN
    )


def parameters(condition: Callable[[Block], bool]) -> list[object]:
    chosen = filter(condition, BLOCKS)
    return [pytest.param(block, id=f"{block.language}-{block.line}") for block in chosen]


def expected(block: Block, table: Mapping[str, str]) -> list[str]:
    """The table's entries for the block's commands."""
    lines = block.commands()
    return [text for start, text in table.items() if any(line.startswith(start) for line in lines)]


def prepare(block: Block, gateway: Gateway) -> None:
    """Bring the gateway into the state that the block expects: with or without the model."""
    headers = {"X-API-Key": ADMIN}
    loads = "models/load" in block.text or "lmstudio-gateway load" in block.text
    action = "deactivate" if loads else "load"
    body = None if loads else {"modelKey": MODEL}
    assert gateway.post(f"/admin/models/{action}", body, headers=headers).status_code == 200


def run(
    command: list[str], environ: dict[str, str], folder: Path, prints: Sequence[str] = ()
) -> None:
    done = subprocess.run(
        command,
        env=environ,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * TIMEOUT,
    )
    assert done.returncode == 0, done.stdout
    missing = [wanted for wanted in prints if not re.search(wanted, done.stdout)]
    assert missing == [], done.stdout


def run_until(output: str, command: list[str], environ: dict[str, str], folder: Path) -> None:
    """Start a command that runs forever, wait for its output, and stop it."""
    log = folder / "endless.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environ, cwd=folder, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            eventually(lambda: output in log.read_text() or process.poll() is not None, TIMEOUT)
            assert process.poll() is None, log.read_text()
        finally:
            process.terminate()
            process.wait(TIMEOUT)


def test_every_block_is_run_or_listed_as_not_run() -> None:
    tested = {"bash", "python", "javascript", "ini", "yaml"}
    assert {block.language for block in BLOCKS} == tested
    # every example must be a code-block: these tests don't see one behind a plain "::"
    text = (ROOT / "README.rst").read_text()
    assert not re.search(r"^(?! *\.\. ).*::$", text, re.MULTILINE)
    unlisted = [
        f"{block}: {line}"
        for block in filter(is_run, BLOCKS)
        for line in block.commands()
        if not SAFE.match(line)
    ]
    assert unlisted == [], "neither safe nor listed in NOT_RUN with a reason"


@pytest.mark.parametrize("start", [*NOT_RUN, *ENDLESS, *PRINTS])
def test_every_listed_command_is_in_the_readme(start: str) -> None:
    assert any(line.startswith(start) for block in BLOCKS for line in block.commands())


@pytest.mark.parametrize("block", parameters(is_run))
def test_commands(
    block: Block, guarded: Gateway, table: dict[str, str], environ: dict[str, str], folder: Path
) -> None:
    assert all(map(SAFE.match, block.commands())), f"not run: {block}"
    if "npm" in block.text:
        need("npm")
    prepare(block, guarded)
    command = ["bash", "-euo", "pipefail", "-c", replaced(block.text, table)]
    if output := expected(block, ENDLESS):
        # exec, so that the signal reaches the command and not bash
        run_until(*output, [*command[:-1], f"exec {command[-1]}"], environ, folder)
    else:
        run(command, environ, folder, expected(block, PRINTS))


@pytest.mark.parametrize("block", parameters(lambda block: block.language == "python"))
def test_python(
    block: Block, guarded: Gateway, table: dict[str, str], environ: dict[str, str], folder: Path
) -> None:
    prepare(block, guarded)
    code = replaced(block.text, table)
    run([sys.executable, "-c", code], environ, folder, expected(block, PRINTS))


@pytest.mark.parametrize("block", parameters(lambda block: block.language == "javascript"))
def test_javascript(
    block: Block, guarded: Gateway, table: dict[str, str], environ: dict[str, str], folder: Path
) -> None:
    node = need("node")
    if not (folder / "node_modules/openai").is_dir():
        run([need("npm"), "install", "openai"], environ, folder)
    prepare(block, guarded)
    (folder / "chat.mjs").write_text(replaced(block.text, table))
    run([node, "chat.mjs"], environ, folder, expected(block, PRINTS))


@pytest.mark.parametrize("block", parameters(lambda block: block.language == "ini"))
def test_settings(block: Block, table: dict[str, str]) -> None:
    lines = replaced(block.text, table).splitlines()
    given = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    load({"GATEWAY_API_KEY": KEY, **given})


@pytest.mark.parametrize("block", parameters(lambda block: block.language == "yaml"))
def test_the_prometheus_configuration_works(
    block: Block, guarded: Gateway, table: dict[str, str]
) -> None:
    [job] = yaml.safe_load(replaced(block.text, table))["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    bearer = {"Authorization": f"Bearer {job['authorization']['credentials']}"}
    response = requests.get(f"http://{target}{job['metrics_path']}", headers=bearer, timeout=60)
    assert response.status_code == 200, response.text
    families = {family.name for family in text_string_to_metric_families(response.text)}
    assert "lmstudio_gateway_requests" in families


def need(binary: str) -> str:
    """The path of a program; skips the test on a machine without it."""
    return shutil.which(binary) or pytest.skip(f"{binary} is not installed")
