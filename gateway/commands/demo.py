"""``lmstudio-gateway demo``: starts a simulator and a gateway, and shows them at work over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import requests

from gateway.commands.client import read_events
from gateway.settings import TABLE

PREFERRED_PORT = 8002
MODEL = "qwen2.5-7b-instruct"
START_TIMEOUT = 30.0


class DemoError(Exception):
    """The tour can't continue; the text says why."""


def run(*, once: bool) -> int:
    """Run the tour; then, unless ``once``, keep everything running until Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with ExitStack() as stack:
            state = stack.enter_context(tempfile.TemporaryDirectory(prefix="lmstudio-gateway-"))
            lmstudio = stack.enter_context(_simulator())
            url = stack.enter_context(_gateway(lmstudio, state))
            _tour(url, lmstudio)
            if not once:
                print("\nThe gateway and the simulator keep running until Ctrl-C.", flush=True)
                while True:
                    time.sleep(3600)
    except KeyboardInterrupt:
        print("\nStopped.")
    except (DemoError, requests.RequestException) as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    return 0


def _tour(url: str, lmstudio: str) -> None:
    print(f"LM Studio simulator: {lmstudio}   (there is no model behind it)")
    print(f"Gateway:             {url}")
    with requests.Session() as http:
        http.trust_env = False
        _show_models(http, url)
        _show_load(http, url)
        _show_chat(http, url)
    print(_next_steps(url))


def _show_models(http: requests.Session, url: str) -> None:
    _title("GET /admin/models")
    listing = _json(http.get(f"{url}/admin/models", timeout=30))
    for model in listing["downloaded"]:
        size = model["size"] / 1e9
        print(f"  {model['modelKey']:42} {model['type']:10} {size:7.1f} GB")


def _show_load(http: requests.Session, url: str) -> None:
    _title(f"POST /admin/models/load  {MODEL}")
    body = {
        "modelKey": MODEL,
        "instanceId": "primary",
        "loadConfig": {"contextLength": 8192, "gpu": {"ratio": 1.0}, "cpuThreads": 4},
        "defaultInference": {"temperature": 0.7, "maxTokens": 256},
    }
    headers = {"Accept": "text/event-stream"}
    response = http.post(
        f"{url}/admin/models/load", json=body, headers=headers, stream=True, timeout=120
    )
    for event, data in _events(response):
        if event == "model_load_progress":
            _bar(data["progressRaw"])
        elif event == "model_load_complete":
            print(f"\n  loaded as {data['instanceId']} in {data['totalTimeMs']} ms")
            print(f"  applied: {json.dumps(data['appliedConfig'])[:160]}")
        elif event == "error":
            raise DemoError(data["error"])


def _show_chat(http: requests.Session, url: str) -> None:
    _title("POST /v1/chat/completions  (no model named: the active one is injected)")
    body = {"stream": True, "messages": [{"role": "user", "content": "Who are you?"}]}
    response = http.post(f"{url}/v1/chat/completions", json=body, stream=True, timeout=120)
    print("  ", end="")
    for _, data in _events(response):
        if data == "[DONE]":
            break
        if "error" in data:
            raise DemoError(str(data["error"]))
        for choice in data["choices"]:
            print(choice["delta"].get("content") or "", end="", flush=True)
    print()


def _next_steps(url: str) -> str:
    return f"""
Next, try:

  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"stream": true, "messages": [{{"role": "user", "content": "count to 10"}}]}}'

  python -c 'from openai import OpenAI
  openai = OpenAI(base_url="{url}/v1", api_key="unused")
  messages = [{{"role": "user", "content": "Hello"}}]
  print(openai.chat.completions.create(model="", messages=messages).choices[0].message.content)'
"""


# Processes ------------------------------------------------------------------------------------


@contextmanager
def _simulator() -> Iterator[str]:
    """The simulator on a free port; yields its URL."""
    command = [sys.executable, "-m", "gateway.simulator", "--port", "0"]
    with _process(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        if "listening on " not in line:
            raise DemoError("the simulator did not start")
        yield line.rpartition(" ")[2].strip()


@contextmanager
def _gateway(lmstudio: str, state: str) -> Iterator[str]:
    """The gateway on port 8002 or the next free one; yields its URL."""
    port = _free_port()
    # keep the user's own settings out of the demo; its own working directory keeps ./.env out
    settings = {setting.variable for setting in TABLE}
    inherited = {name: value for name, value in os.environ.items() if name not in settings}
    environ = inherited | {
        "LMSTUDIO_BASE_URL": lmstudio,
        "GATEWAY_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "WEB_CONCURRENCY": "2",
        "LOG_LEVEL": "warn",
        "STATE_URL": f"sqlite:///{state}/state.db",
    }
    command = [sys.executable, "-m", "gateway", "serve"]
    url = f"http://127.0.0.1:{port}"
    with _process(command, env=environ, cwd=state) as process:
        _await_health(process, url)
        yield url


@contextmanager
def _process(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    # a session of its own, so that Ctrl-C reaches only the demo, which ends its children in order
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _await_health(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError("the gateway did not start")
        try:
            if requests.get(f"{url}/health", timeout=2).ok:
                return
        except requests.RequestException:
            time.sleep(0.05)
    raise DemoError("the gateway did not respond in time")


def _free_port() -> int:
    for port in (*range(PREFERRED_PORT, PREFERRED_PORT + 100), 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise DemoError("no free port")


# Output ---------------------------------------------------------------------------------------


def _events(response: requests.Response) -> Iterator[tuple[str, Any]]:
    """The name and data of each event of a response; DemoError for an error response."""
    if not response.ok:
        raise DemoError(f"{response.status_code}: {response.text}")
    for _, name, data in read_events(response.iter_lines()):
        yield name, data if data == "[DONE]" else json.loads(data)


def _json(response: requests.Response) -> Any:
    if not response.ok:
        raise DemoError(f"{response.status_code}: {response.text}")
    return response.json()


def _title(text: str) -> None:
    print(f"\n{text}", flush=True)


def _bar(fraction: float) -> None:
    filled = round(fraction * 40)
    lead = "\r" if sys.stdout.isatty() else "\n"
    bar = "#" * filled + "." * (40 - filled)
    print(f"{lead}  [{bar}] {fraction:6.1%}", end="", flush=True)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
