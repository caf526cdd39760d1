"""Runs with every kind of key and a marked prompt, and searches all that they leave behind."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Gateway, Simulator, eventually

NAMED, PLAIN = "named-secret-0a1b2c3d4e5f", "plain-secret-1b2c3d4e5f6a"
ADMIN, WRONG = "admin-secret-2c3d4e5f6a7b", "wrong-secret-3d4e5f6a7b8c"
TOKEN = "sk-lm-AbCdEfGh:AbCdEfGhIjKlMnOpQrSt"
KEYS = [NAMED, PLAIN, ADMIN, WRONG, TOKEN]
PROMPT = "zebra-prompt-marker-7788"
#: The simulator's completion of every prompt without a number.
COMPLETION = "LM Studio simulator speaking"
MODEL = "qwen2-1.5b-instruct"
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}]},
    "/v1/completions": {"prompt": PROMPT},
    "/v1/responses": {"input": PROMPT},
    "/v1/messages": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 50},
}
FAULTS = ["", "refuse-500", "error-string-500", "status-429", "close-before-head", "garbage-head",
          "break-stream", "break-plain", "error-in-stream-data", "error-200", "gzip"]  # fmt: skip


@dataclass
class Run:
    """The traces of a run. ``own`` has the texts that the gateway itself writes, by origin."""

    own: dict[str, str] = field(default_factory=dict)
    upstream: list[dict[str, Any]] = field(default_factory=list)
    responses: list[str] = field(default_factory=list)


@pytest.fixture(scope="module", params=["text", "json"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    simulator = Simulator(0, "--pace-ms", "0", "--token", TOKEN)
    gateway = Gateway(
        tmp_path_factory.mktemp("secrets"),
        simulator.url,
        GATEWAY_API_KEY=f"someone:{NAMED},{PLAIN}",
        GATEWAY_ADMIN_KEY=f"operator:{ADMIN}",
        LMSTUDIO_API_TOKEN=TOKEN,
        LOG_LEVEL="debug",
        LOG_FORMAT=request.param,
        MAX_BODY_BYTES=100_000,
    )
    try:
        yield _traces(gateway, simulator)
    finally:
        gateway.stop()
        simulator.stop()


def _traces(gateway: Gateway, simulator: Simulator) -> Run:
    found = Run()
    found.own["events"] = ""
    threading.Thread(target=_listen, args=(gateway, found), daemon=True).start()
    eventually(lambda: "connected" in found.own["events"], 30)
    _send_everything(gateway, found)
    _administer(gateway, found)
    admin = {"X-API-Key": ADMIN}
    for path in ("/debug/status", "/debug/metrics", "/metrics", "/health", "/admin/models"):
        found.own[path] = gateway.get(path, headers=admin).text
    eventually(lambda: found.own["events"].count("event: inference_complete") > 20, 30)
    eventually(lambda: "event: model_load_complete" in found.own["events"], 30)
    for pid in (gateway.process.pid, *gateway.workers()):
        found.own[f"command line of {pid}"] = Path(f"/proc/{pid}/cmdline").read_text()
    found.upstream = simulator.requests()
    gateway.stop()
    found.own["log"] = gateway.logged()
    found.own["state"] = "".join(
        path.read_bytes().decode("latin-1") for path in gateway.folder.glob("state.db*")
    )
    return found


def _listen(gateway: Gateway, found: Run) -> None:
    headers = {"Authorization": f"Bearer {ADMIN}"}
    with gateway.http.get(gateway.url + "/debug/stream", headers=headers, stream=True) as response:
        try:
            for piece in response.iter_content(None):
                found.own["events"] += piece.decode()
        except (OSError, ValueError):
            return


def _send(gateway: Gateway, found: Run, method: str, path: str, **options: Any) -> None:
    try:
        response = gateway.http.request(method, gateway.url + path, timeout=60, **options)
    except OSError:
        return  # some faults break the response
    found.responses.append(f"{response.status_code} {response.headers} {response.text}")


def _send_everything(gateway: Gateway, found: Run) -> None:
    for path, content in ENDPOINTS.items():
        for number, fault in enumerate(FAULTS):
            headers = {"Authorization": f"Bearer {(NAMED, PLAIN)[number % 2]}"}
            headers |= {"X-Simulator-Fault": fault} if fault else {}
            for stream in (False, True):
                body = {"model": MODEL, "stream": stream, **content}
                _send(gateway, found, "POST", path, json=body, headers=headers)
        for key in (WRONG, ""):
            headers = {"Authorization": f"Bearer {key}", "X-API-Key": key}
            _send(gateway, found, "POST", path, json=content, headers=headers)
        for corrupted in (f'{{"prompt": "{PROMPT}", ', f'["{PROMPT}"]', f'"{PROMPT * 9000}"'):
            _send(gateway, found, "POST", path, data=corrupted, headers={"X-API-Key": PLAIN})
    query = f"/v1/models?api_key={NAMED}&token={ADMIN}"
    _send(gateway, found, "GET", query, headers={"Cookie": f"key={PLAIN}"})
    _send(gateway, found, "GET", "/v1/models", headers={"Authorization": f"Basic {NAMED}"})


def _administer(gateway: Gateway, found: Run) -> None:
    for key in (ADMIN, NAMED, WRONG):
        headers = {"Authorization": f"Bearer {key}"}
        for verb, body in (
            ("load", {"modelKey": MODEL, "instanceId": "one"}),
            ("load", {"modelKey": MODEL, "instanceId": "one"}),
            ("load", {"modelKey": "unknown"}),
            ("activate", {"modelKey": MODEL, "x": 1}),
            ("activate", {"modelKey": MODEL, "defaultInference": {"temperature": 0.5}}),
            ("unload", {"instanceId": "one"}),
            ("deactivate", {}),
        ):
            _send(gateway, found, "POST", f"/admin/models/{verb}", json=body, headers=headers)
        _send(gateway, found, "GET", "/api/v0/models", headers=headers)


def test_the_run_covers_every_kind_of_response(run: Run) -> None:
    statuses = {response[:3] for response in run.responses}
    assert {"200", "400", "401", "403", "404", "413", "429", "500", "502"} <= statuses
    assert any(COMPLETION in response for response in run.responses)
    assert any(PROMPT.encode() in one["body"] for one in run.upstream)
    assert "model_load_complete" in run.own["events"]
    assert len([name for name in run.own if name.startswith("command line")]) == 3


@pytest.mark.parametrize("secret", [*KEYS, PROMPT, COMPLETION])
def test_nothing_that_the_gateway_writes_contains_a_secret(run: Run, secret: str) -> None:
    for origin, text in run.own.items():
        at = text.find(secret)
        assert at < 0, f"{origin}: {text[max(0, at - 300) : at + 100]}"


@pytest.mark.parametrize("key", KEYS)
def test_no_response_contains_a_key(run: Run, key: str) -> None:
    for response in run.responses:
        assert key not in response


def test_no_error_repeats_the_prompt(run: Run) -> None:
    for response in run.responses:
        assert response.startswith("200") or PROMPT not in response


def test_lm_studio_receives_its_token_and_no_other_key(run: Run) -> None:
    requests = [one for one in run.upstream if one["target"] != "/lmstudio-greeting"]
    assert requests
    for one in requests:
        headers = {name.lower(): value for name, value in one["headers"]}
        if headers.get("upgrade") is None:
            assert headers["authorization"] == f"Bearer {TOKEN}"
        received = json.dumps([one["headers"], one["target"]]) + one["body"].decode("latin-1")
        for key in (NAMED, PLAIN, ADMIN, WRONG):
            assert key not in received, received
