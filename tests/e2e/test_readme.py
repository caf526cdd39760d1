"""Every code block of README.rst works as it stands there, against a real gateway."""

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
PATIENCE = 60.0

#: Commands that do nothing here but what they should. A block with any other is not run.
HARMLESS = re.compile(
    r"(cp \.env\.example \.env|npm install openai|export [A-Z_]+=|curl |python3 -c |"
    r"lmstudio-gateway (check|serve|simulate|load|models|status)\b)"
)
#: What a block that is not run begins a line with, and why it is not run.
NOT_RUN = {
    "python3 -m venv ": "tests/newcomer runs it, which takes a minute",
    "pip install . && ": "tests/newcomer runs it, which takes a minute",
    "pip install '.[test]' && pytest": "it is what runs this; .ci/run begins with it",
}
#: What runs until it is stopped, and the words that show that it works.
ENDLESS = {
    "lmstudio-gateway simulate": "listening on",
    "lmstudio-gateway serve": "Worker serves",
    "curl -N -H 'Authorization: Bearer YOUR-ADMIN-KEY' http://127.0.0.1:8002/debug/stream": (
        "event: connected"
    ),
}
#: What some commands must print, as a pattern; all others must only succeed.
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
    """Where the module's blocks run one after the other, as a reader's terminal would."""
    made = tmp_path_factory.mktemp("reader")
    shutil.copy(ROOT / ".env.example", made)
    # curl's own exit status for an HTTP error, and an end for what hangs
    (made / ".curlrc").write_text("fail-with-body\nmax-time = 60\n")
    return made


@pytest.fixture
def table(guarded: Gateway, simulator: Simulator) -> dict[str, str]:
    """What stands in README.rst → what is true here."""
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
    """The environment of a reader whose .env says what the gateway's says."""
    binaries = str(Path(sys.executable).parent)
    return {
        **guarded.environ,
        "GATEWAY_URL": guarded.url,
        "GATEWAY_PORT": str(free_port()),  # for a second gateway of the reader's
        "STATE_URL": f"sqlite:///{folder}/state.db",
        "CURL_HOME": str(folder),
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "NO_PROXY": "*",
    }


def is_run(block: Block) -> bool:
    return block.language == "bash" and not any(
        line.startswith(start) for line in block.commands() for start in NOT_RUN
    )


def named(wanted: Callable[[Block], bool]) -> list[object]:
    chosen = filter(wanted, BLOCKS)
    return [pytest.param(block, id=f"{block.language}-{block.line}") for block in chosen]


def words(block: Block, among: Mapping[str, str]) -> list[str]:
    """What the table says of the block's commands."""
    lines = block.commands()
    return [told for start, told in among.items() if any(line.startswith(start) for line in lines)]


def prepare(block: Block, gateway: Gateway) -> None:
    """What a reader has done before: the model is loaded and active, unless the block loads it."""
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
        timeout=2 * PATIENCE,
    )
    assert done.returncode == 0, done.stdout
    missing = [wanted for wanted in prints if not re.search(wanted, done.stdout)]
    assert missing == [], done.stdout


def run_until(said: str, command: list[str], environ: dict[str, str], folder: Path) -> None:
    """Start what has no end, wait until it has said something, and stop it."""
    log = folder / "endless.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environ, cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            eventually(lambda: said in log.read_text() or process.poll() is not None, PATIENCE)
            assert process.poll() is None, log.read_text()
        finally:
            process.terminate()
            process.wait(PATIENCE)


def test_every_block_is_marked_and_is_run_or_listed() -> None:
    tested = {"bash", "python", "javascript", "ini", "yaml"}
    assert {block.language for block in BLOCKS} == tested
    # an indented example must be a code block: "::" alone would hide it from these tests
    text = (ROOT / "README.rst").read_text()
    assert not re.search(r"^(?! *\.\. ).*::$", text, re.MULTILINE)
    unlisted = [
        f"{block}: {line}"
        for block in filter(is_run, BLOCKS)
        for line in block.commands()
        if not HARMLESS.match(line)
    ]
    assert unlisted == [], "neither harmless nor listed in NOT_RUN with a reason"


@pytest.mark.parametrize("start", [*NOT_RUN, *ENDLESS, *PRINTS])
def test_what_is_listed_is_in_the_readme(start: str) -> None:
    assert any(line.startswith(start) for block in BLOCKS for line in block.commands())


@pytest.mark.parametrize("block", named(is_run))
def test_commands(
    block: Block, guarded: Gateway, table: dict[str, str], environ: dict[str, str], folder: Path
) -> None:
    assert all(map(HARMLESS.match, block.commands())), f"not run: {block}"
    if "npm" in block.text:
        need("npm")
    prepare(block, guarded)
    command = ["bash", "-euo", "pipefail", "-c", replaced(block.text, table)]
    if said := words(block, ENDLESS):
        # exec: a signal for bash must reach the command itself
        run_until(*said, [*command[:-1], f"exec {command[-1]}"], environ, folder)
    else:
        run(command, environ, folder, words(block, PRINTS))


@pytest.mark.parametrize("block", named(lambda block: block.language == "python"))
def test_python(
    block: Block, guarded: Gateway, table: dict[str, str], environ: dict[str, str], folder: Path
) -> None:
    prepare(block, guarded)
    code = replaced(block.text, table)
    run([sys.executable, "-c", code], environ, folder, words(block, PRINTS))


@pytest.mark.parametrize("block", named(lambda block: block.language == "javascript"))
def test_javascript(
    block: Block, guarded: Gateway, table: dict[str, str], environ: dict[str, str], folder: Path
) -> None:
    node = need("node")
    if not (folder / "node_modules/openai").is_dir():
        run([need("npm"), "install", "openai"], environ, folder)
    prepare(block, guarded)
    (folder / "chat.mjs").write_text(replaced(block.text, table))
    run([node, "chat.mjs"], environ, folder, words(block, PRINTS))


@pytest.mark.parametrize("block", named(lambda block: block.language == "ini"))
def test_settings(block: Block, table: dict[str, str]) -> None:
    lines = replaced(block.text, table).splitlines()
    given = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    load({"GATEWAY_API_KEY": KEY, **given})


@pytest.mark.parametrize("block", named(lambda block: block.language == "yaml"))
def test_prometheus_can_do_what_it_is_told(
    block: Block, guarded: Gateway, table: dict[str, str]
) -> None:
    [job] = yaml.safe_load(replaced(block.text, table))["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    bearer = {"Authorization": f"Bearer {job['authorization']['credentials']}"}
    answer = requests.get(f"http://{target}{job['metrics_path']}", headers=bearer, timeout=60)
    assert answer.status_code == 200, answer.text
    families = {family.name for family in text_string_to_metric_families(answer.text)}
    assert "lmstudio_gateway_requests" in families


def need(binary: str) -> str:
    """The path of a program of Node.js, which not every machine has."""
    return shutil.which(binary) or pytest.skip(f"{binary} is not installed")
