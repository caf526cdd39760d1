"""``python -m tests.newcomer``: follows README.rst in a fresh clone and a new environment.

It runs README.rst's own commands; only ports, keys and what a reader would edit are replaced. It
prints each step. If one fails, it prints the step's output and exits with status 1.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.browser import Window, chromium
from tests.nginx import Nginx
from tests.processes import clean_environ, default_signals_for_children, free_port
from tests.readme import ROOT, Block, blocks, replaced

KEY, ADMIN = "inference-key-0123456789", "admin-key-0123456789abc"
MODEL = "qwen2.5-7b-instruct"
TIMEOUT = 60.0
INSTALL_TIMEOUT = 600.0
#: Variables of the tests' environment that a newcomer's shell would not have.
NOT_INHERITED = {"VIRTUAL_ENV", "PYTHONPATH"}


class StepFailed(Exception):
    """A step did not do what README.rst promises. The text is its output."""


class Newcomer:
    """A reader of README.rst with a shell in a fresh clone."""

    def __init__(self, clone: Path, logs: Path) -> None:
        self.clone = clone
        self.readme = blocks(clone / "README.rst")
        self.lmstudio, self.gateway = free_port(), free_port()
        #: Text of README.rst → its replacement in this run.
        self.table = {
            "simulate --port 1234": f"simulate --port {self.lmstudio}",
            "127.0.0.1:8002": f"127.0.0.1:{self.gateway}",
            "YOUR-KEY": KEY,
            "YOUR-ADMIN-KEY": ADMIN,
        }
        clean = clean_environ()
        for name in NOT_INHERITED:
            clean.pop(name, None)
        # as "activate" does for the commands that follow it
        path = f"{clone}/venv/bin:{clean['PATH']}"
        self.environ = {**clean, "PATH": path, "NO_PROXY": "*", "PYTHONUNBUFFERED": "1"}
        self._logs = logs

    def block(self, command: str, language: str = "bash", nth: int = 0) -> Block:
        """The nth block of README.rst with a command that begins like this."""
        found = [
            block
            for block in self.readme
            if block.language == language
            and any(line.startswith(command) for line in block.commands())
        ]
        if nth >= len(found):
            raise StepFailed(f"README.rst has no such {language} block: {command}")
        return found[nth]

    def do(
        self, block: Block, *prints: str, edits: dict[str, str] | None = None, limit: float = 0
    ) -> None:
        """Run a block to its end; it must succeed and print these texts."""
        with self._process(block, edits) as (process, output):
            try:
                process.wait(limit or TIMEOUT)
            except subprocess.TimeoutExpired:
                raise StepFailed(f"{output()}\n(did not end in time)") from None
            missing = [text for text in prints if text not in output()]
            if process.returncode or missing:
                problem = f"exit status {process.returncode}, not in the output: {missing}"
                raise StepFailed(f"{output()}\n({problem})")

    @contextmanager
    def running(
        self, block: Block, prints: str, edits: dict[str, str] | None = None
    ) -> Iterator[None]:
        """Keep a block running during the ``with`` block, which waits until it prints this."""
        with self._process(block, edits) as (process, output):
            deadline = time.monotonic() + TIMEOUT
            while prints not in output():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise StepFailed(f"{output()}\n(did not print {prints!r})")
                time.sleep(0.05)
            yield

    @contextmanager
    def _process(
        self, block: Block, edits: dict[str, str] | None
    ) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
        text = block.text
        for old, new in (edits or {}).items():
            if old not in text:
                raise StepFailed(f"{text}\n(does not contain {old!r})")
            text = text.replace(old, new)
        print("".join(f"    {line}\n" for line in text.splitlines()), end="", flush=True)
        log = self._logs / f"line-{block.line}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", replaced(text, self.table)],
                cwd=self.clone,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process, lambda: log.read_text(errors="replace")
        finally:
            if process.poll() is None:
                # like Ctrl-C in a terminal, for bash and its children
                os.killpg(process.pid, signal.SIGINT)
                process.wait(TIMEOUT)

    def edit_env_file(self) -> None:
        """Write README.rst's settings and this run's ports into .env."""
        wanted = replaced(self.block("GATEWAY_API_KEY=", "ini").text, self.table).splitlines()
        wanted += [
            f"LMSTUDIO_BASE_URL=http://127.0.0.1:{self.lmstudio}",
            f"GATEWAY_PORT={self.gateway}",
            "TRUSTED_PROXIES=127.0.0.1",  # as deploy/nginx.conf says
        ]
        new = {_name(line): line for line in wanted}
        file = self.clone / ".env"
        lines = file.read_text().splitlines()
        if missing := new.keys() - set(map(_name, lines)):
            raise StepFailed(f".env.example has no {missing}")
        file.write_text("".join(f"{new.get(_name(line), line)}\n" for line in lines))


def clone_into(folder: Path) -> Path:
    """A clone of this checkout's commit, like the one that a reader of README.rst has."""
    clone = folder / "lmstudio-gateway"
    command = ["git", "clone", "--quiet", str(ROOT), str(clone)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise StepFailed(done.stderr)
    return clone


def follow_readme(folder: Path) -> None:
    with ExitStack() as stack:
        step("a clone")
        newcomer = Newcomer(clone_into(folder), folder)
        do, running, block = newcomer.do, newcomer.running, newcomer.block
        # fail before the long part
        if not (newcomer.clone / "deploy/nginx.conf").exists():
            raise StepFailed("deploy/nginx.conf is not in this commit")

        step("Try it")
        do(block("python3 -m venv"))
        once = {"lmstudio-gateway demo": "lmstudio-gateway demo --once"}
        shown = ("loaded as primary", "LM Studio simulator speaking")
        do(block("pip install . &&"), *shown, edits=once, limit=INSTALL_TIMEOUT)

        step("Run it: the simulator as LM Studio, with a configuration of your own")
        stack.enter_context(running(block("lmstudio-gateway simulate"), "listening on"))
        do(block("cp .env.example"))
        newcomer.edit_env_file()
        do(block("lmstudio-gateway check"), "ok    LM Studio SDK: connected")
        stack.enter_context(running(block("lmstudio-gateway serve"), "Worker ready"))
        do(block("lmstudio-gateway load"), MODEL, ": 100 %", f"Loaded {MODEL}")

        step("nginx in front, with deploy/nginx.conf")
        front = Nginx(folder / "nginx", f"http://127.0.0.1:{newcomer.gateway}")
        stack.callback(front.stop)
        # from here on all requests go through nginx
        newcomer.table["http://192.168.1.10:8002"] = front.url
        newcomer.table["http://127.0.0.1:8002"] = front.url

        step("a load with its progress, from the command line of another machine")
        do(block("export GATEWAY_URL="), ": 100 %", "as primary")

        step("a live stream on the dashboard")
        browser = chromium(folder / "chromium")
        stack.callback(browser.quit)
        dashboard = Window(browser, front.url)
        dashboard.open(ADMIN)
        dashboard.see("#connection", "Live")
        long = {"Hello!": "count to 1000"}
        with running(block("curl -N http://127.0.0.1:8002/v1/chat"), "data: ", edits=long):
            dashboard.see("#running > li", "/v1/chat/completions", "primary", "app")
        dashboard.see("#recent > li", "primary", "client disconnected")

        step("Prometheus scrapes")
        scrape(replaced(block("scrape_configs:", "yaml").text, newcomer.table))


def scrape(configuration: str) -> None:
    """Scrape as Prometheus would with this configuration; the metrics must count the stream."""
    [job] = yaml.safe_load(configuration)["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    bearer = {"Authorization": f"Bearer {job['authorization']['credentials']}"}
    response = requests.get(
        f"http://{target}{job['metrics_path']}", headers=bearer, timeout=TIMEOUT
    )
    samples = [
        sample
        for family in text_string_to_metric_families(response.text if response.ok else "")
        for sample in family.samples
        if sample.name == "lmstudio_gateway_cancellations_total"
    ]
    if not response.ok or sum(sample.value for sample in samples) != 1:
        raise StepFailed(response.text)


def step(title: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {title}", flush=True)


def _name(line: str) -> str:
    """The variable of a line of .env."""
    return line.partition("=")[0]


def main() -> int:
    default_signals_for_children()
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        try:
            follow_readme(Path(folder))
        except (StepFailed, AssertionError, requests.RequestException) as failure:
            print(f"FAILED: {failure}", file=sys.stderr)
            return 1
    step("everything works as README.rst says")
    return 0


if __name__ == "__main__":
    sys.exit(main())
