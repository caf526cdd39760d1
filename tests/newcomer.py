"""``python -m tests.newcomer``: what README.rst says, in a fresh clone and a new environment.

The commands are README.rst's own; only ports, keys and what a reader would edit are replaced. It
prints each step; one that fails shows its output and ends everything with status 1.
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

from gateway.settings import TABLE
from tests.browser import Window, chromium
from tests.nginx import Nginx
from tests.processes import free_port
from tests.readme import ROOT, Block, blocks, replaced

KEY, ADMIN = "inference-key-0123456789", "admin-key-0123456789abc"
MODEL = "qwen2.5-7b-instruct"
PATIENCE = 60.0
INSTALL_PATIENCE = 600.0
#: What a newcomer's shell would not have: our environment, and our settings.
OURS = {setting.variable for setting in TABLE} | {
    *("VIRTUAL_ENV", "PYTHONPATH", "WEB_CONCURRENCY", "GATEWAY_URL")
}


class StepFailed(Exception):
    """A step did not do what README.rst promises; the text is its output."""


class Newcomer:
    """Somebody with README.rst and a shell in a fresh clone."""

    def __init__(self, clone: Path, logs: Path) -> None:
        self.clone = clone
        self.readme = blocks(clone / "README.rst")
        self.lmstudio, self.gateway = free_port(), free_port()
        #: What stands in README.rst → what is true here.
        self.table = {
            "simulate --port 1234": f"simulate --port {self.lmstudio}",
            "127.0.0.1:8002": f"127.0.0.1:{self.gateway}",
            "YOUR-KEY": KEY,
            "YOUR-ADMIN-KEY": ADMIN,
        }
        clean = {name: text for name, text in os.environ.items() if name not in OURS}
        # venv/bin: what "activate" does for the commands behind it
        path = f"{clone}/venv/bin:{clean['PATH']}"
        self.environ = {**clean, "PATH": path, "NO_PROXY": "*", "PYTHONUNBUFFERED": "1"}
        self._logs = logs

    def block(self, command: str, language: str = "bash", nth: int = 0) -> Block:
        """The (nth) block of README.rst that has a command which begins like this."""
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
        """Run a block to its end; it must succeed and print these words."""
        with self._process(block, edits) as (process, output):
            try:
                process.wait(limit or PATIENCE)
            except subprocess.TimeoutExpired:
                raise StepFailed(f"{output()}\n(has not ended in time)") from None
            missing = [words for words in prints if words not in output()]
            if process.returncode or missing:
                ended = f"ended with {process.returncode}, does not say {missing}"
                raise StepFailed(f"{output()}\n({ended})")

    @contextmanager
    def running(
        self, block: Block, says: str, edits: dict[str, str] | None = None
    ) -> Iterator[None]:
        """Run a block meanwhile; nothing goes on before it has said these words."""
        with self._process(block, edits) as (process, output):
            deadline = time.monotonic() + PATIENCE
            while says not in output():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise StepFailed(f"{output()}\n(does not say {says!r})")
                time.sleep(0.05)
            yield

    @contextmanager
    def _process(
        self, block: Block, edits: dict[str, str] | None
    ) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
        text = block.text
        for old, new in (edits or {}).items():
            if old not in text:
                raise StepFailed(f"{text}\n(has no {old!r} to edit)")
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
                # as Ctrl-C in a terminal does, to bash and what it runs
                os.killpg(process.pid, signal.SIGINT)
                process.wait(PATIENCE)

    def edit_env_file(self) -> None:
        """Put into .env what README.rst says, and the ports of here."""
        told = replaced(self.block("GATEWAY_API_KEY=", "ini").text, self.table).splitlines()
        told += [
            f"LMSTUDIO_BASE_URL=http://127.0.0.1:{self.lmstudio}",
            f"GATEWAY_PORT={self.gateway}",
            "TRUSTED_PROXIES=127.0.0.1",  # as deploy/nginx.conf says
        ]
        new = {_name(line): line for line in told}
        file = self.clone / ".env"
        lines = file.read_text().splitlines()
        if missing := new.keys() - set(map(_name, lines)):
            raise StepFailed(f".env.example has no {missing}")
        file.write_text("".join(f"{new.get(_name(line), line)}\n" for line in lines))


def clone_into(folder: Path) -> Path:
    """A clone of this checkout's commit, as README.rst's reader has one."""
    clone = folder / "lmstudio-gateway"
    command = ["git", "clone", "--quiet", str(ROOT), str(clone)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise StepFailed(done.stderr)
    return clone


def play(folder: Path) -> None:
    with ExitStack() as stack:
        step("a clone")
        newcomer = Newcomer(clone_into(folder), folder)
        do, running, block = newcomer.do, newcomer.running, newcomer.block
        # it says what it needs before the long part
        if not (newcomer.clone / "deploy/nginx.conf").exists():
            raise StepFailed("deploy/nginx.conf is not in this commit")

        step("Try it")
        do(block("python3 -m venv"))
        once = {"lmstudio-gateway demo": "lmstudio-gateway demo --once"}
        shown = ("loaded as primary", "LM Studio simulator speaking")
        do(block("pip install . &&"), *shown, edits=once, limit=INSTALL_PATIENCE)

        step("Run it: the simulator as LM Studio, a configuration of one's own")
        stack.enter_context(running(block("lmstudio-gateway simulate"), "listening on"))
        do(block("cp .env.example"))
        newcomer.edit_env_file()
        do(block("lmstudio-gateway check"), "ok    LM Studio SDK: connected")
        stack.enter_context(running(block("lmstudio-gateway serve"), "Worker serves"))
        do(block("lmstudio-gateway load"), MODEL, ": 100 %", f"Loaded {MODEL}")

        step("nginx in front, with deploy/nginx.conf")
        front = Nginx(folder / "nginx", f"http://127.0.0.1:{newcomer.gateway}")
        stack.callback(front.stop)
        # from here on the LAN's address is nginx's
        newcomer.table["http://192.168.1.10:8002"] = front.url
        newcomer.table["http://127.0.0.1:8002"] = front.url

        step("a load with its progress, by the command line from elsewhere")
        do(block("export GATEWAY_URL="), ": 100 %", "as primary")

        step("a live stream on the page")
        browser = chromium(folder / "chromium")
        stack.callback(browser.quit)
        page = Window(browser, front.url)
        page.open(ADMIN)
        page.see("#connection", "Live")
        long = {"Hello!": "count to 1000"}
        with running(block("curl -N http://127.0.0.1:8002/v1/chat"), "data: ", edits=long):
            page.see("#running > li", "/v1/chat/completions", "primary", "app")
        page.see("#recent > li", "primary", "client left")

        step("Prometheus scrapes")
        scrape(replaced(block("scrape_configs:", "yaml").text, newcomer.table))


def scrape(configuration: str) -> None:
    """Do what Prometheus does with this, and see that the exposition tells of the stream."""
    [job] = yaml.safe_load(configuration)["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    bearer = {"Authorization": f"Bearer {job['authorization']['credentials']}"}
    answer = requests.get(f"http://{target}{job['metrics_path']}", headers=bearer, timeout=PATIENCE)
    samples = [
        sample
        for family in text_string_to_metric_families(answer.text if answer.ok else "")
        for sample in family.samples
        if sample.name == "lmstudio_gateway_cancellations_total"
    ]
    if not answer.ok or sum(sample.value for sample in samples) != 1:
        raise StepFailed(answer.text)


def step(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def _name(line: str) -> str:
    """The variable of a line of .env."""
    return line.partition("=")[0]


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        try:
            play(Path(folder))
        except (StepFailed, AssertionError, requests.RequestException) as failure:
            print(f"FAILED: {failure}", file=sys.stderr)
            return 1
    step("all is as README.rst says")
    return 0


if __name__ == "__main__":
    sys.exit(main())
