"""The responses of a running gateway match /openapi.json to the last member."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from jsonschema import Draft202012Validator, FormatChecker

from tests.processes import Gateway, Simulator, eventually, free_port

QWEN, SMALL = "qwen2.5-7b-instruct", "qwen2-1.5b-instruct"
EMBEDDING, TOO_LARGE = "text-embedding-nomic-embed-text-v1.5", "deepseek-r1-671b"
CHAT = {"model": SMALL, "messages": [{"role": "user", "content": "count to 3"}], "max_tokens": 9}
LOAD, UNLOAD = "/admin/models/load", "/admin/models/unload"
ACTIVATE, DEACTIVATE = "/admin/models/activate", "/admin/models/deactivate"
#: The keys and the body limit of the strict gateway.
KEY, ADMIN_KEY, LIMIT = "inference-key-0123456789", "admin-key-0123456789abc", 100_000
Launch = Callable[..., Gateway]


def closed(node: Any) -> Any:
    """A schema that rejects members that it does not name, unless it allows them explicitly."""
    if isinstance(node, list):
        return [closed(inner) for inner in node]
    if not isinstance(node, dict):
        return node
    extra = {"additionalProperties": False} if node.get("properties") else {}
    return extra | {name: closed(inner) for name, inner in node.items()}


class Description:
    """A gateway's own /openapi.json, against which real responses are checked."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._paths = document["paths"]
        self._components = document["components"]
        self._schemas = {"components": closed({"schemas": self._components["schemas"]})}

    def check(self, response: requests.Response, status: int) -> requests.Response:
        """Check that the response has this status and matches its description; return it."""
        assert response.status_code == status, response.text
        method, url = str(response.request.method).lower(), str(response.request.url)
        responses = self._operation(urlsplit(url).path, method)["responses"]
        described = self._resolve(responses[str(status)])
        for name, reference in described["headers"].items():
            header = self._resolve(reference)
            assert name in response.headers, f"{method} {url} {status}: no {name}"
            kind = header["schema"].get("type")
            value = response.headers[name]
            self._validate(int(value) if kind == "integer" else value, header["schema"])
        kind = response.headers["Content-Type"].partition(";")[0]
        content = described["content"]
        assert kind in content or "*/*" in content, f"{method} {url} {status}: {kind}"
        if kind == "application/json":
            self._validate(response.json(), content.get(kind, {}).get("schema", {}))
        return response

    def _operation(self, path: str, method: str) -> dict[str, Any]:
        if path not in self._paths:
            templates = [known for known in self._paths if "{" in known]
            fitting = [t for t in templates if re.match(t.replace("{path}", ".+$"), path)]
            path = max(fitting, key=len)
        operation: dict[str, Any] = self._paths[path][method]
        return operation

    def _resolve(self, node: dict[str, Any]) -> dict[str, Any]:
        if "$ref" not in node:
            return node
        kind, name = node["$ref"].split("/")[-2:]
        found: dict[str, Any] = self._components[kind][name]
        return found

    def _validate(self, value: Any, schema: dict[str, Any]) -> None:
        checker = FormatChecker(["date-time"])
        Draft202012Validator(schema | self._schemas, format_checker=checker).validate(value)


@pytest.fixture
def described(gateway: Gateway) -> Description:
    return Description(gateway.get("/openapi.json").json())


@pytest.fixture(scope="module")
def unreachable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose LM Studio is not running."""
    dead = f"http://127.0.0.1:{free_port()}"
    folder = tmp_path_factory.mktemp("unreachable")
    gateway = Gateway(folder, dead, WEB_CONCURRENCY=1, SDK_RETRY_DELAY=10)
    yield gateway
    gateway.stop()


def bearer(key: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {key}"}}


def test_responses_of_admin(gateway: Gateway, described: Description) -> None:
    config = {"contextLength": 4096, "gpu": {"ratio": 0.5, "mainGpu": 0}, "seed": 1,
              "llamaKCacheQuantizationType": "q8_0", "ropeFrequencyBase": 10_000}  # fmt: skip
    defaults = {"temperature": 0.5, "stopStrings": ["x"]}
    load = {"modelKey": QWEN, "instanceId": "one", "loadConfig": config, "ttlSeconds": 600}
    described.check(gateway.get("/admin/models"), 200)
    described.check(gateway.post(LOAD, load | {"defaultInference": defaults}), 200)
    described.check(gateway.post(LOAD, load), 409)
    described.check(gateway.post(LOAD, {"modelKey": EMBEDDING, "activate": False}), 200)
    with gateway.post(
        LOAD, {"modelKey": SMALL}, headers={"Accept": "text/event-stream"}, stream=True
    ) as streamed:
        described.check(streamed, 200)
        assert "event: model_load_complete" in streamed.text
    described.check(gateway.get("/admin/models"), 200)
    described.check(gateway.post(ACTIVATE, {"modelKey": "not/loaded"}), 200)
    active = described.check(gateway.get("/admin/models"), 200).json()["active"]
    assert active["instanceId"] is None
    described.check(gateway.post(UNLOAD, {"instanceId": "one"}), 200)
    described.check(gateway.post(UNLOAD, {"instanceId": "one"}), 404)
    described.check(gateway.post(DEACTIVATE), 200)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (LOAD, {"modelKey": "", "loadConfig": {"gpu": {"disabledGpus": [-1]}}, "x": 1}, 400),
        (LOAD, {"modelKey": SMALL, "loadConfig": {"gpu": {"layers": 5}}}, 400),
        (LOAD, {"modelKey": "no-such-model"}, 404),
        (LOAD, {"modelKey": TOO_LARGE}, 502),
        (UNLOAD, {}, 400),
        (UNLOAD, {"modelKey": SMALL}, 404),
        (ACTIVATE, {"modelkey": SMALL}, 400),
        (DEACTIVATE, {"modelKey": SMALL}, 400),
    ],
)
def test_errors_of_admin(
    gateway: Gateway, described: Description, path: str, body: Any, status: int
) -> None:
    described.check(gateway.post(path, body), status)


def test_responses_of_debug_metrics_and_health(
    gateway: Gateway, described: Description, simulator: Simulator
) -> None:
    views = ("/debug/status", "/debug/metrics", "/metrics", "/health", "/health/ready")
    for view in (*views, "/openapi.json"):
        described.check(gateway.get(view), 200)
    described.check(gateway.post(LOAD, {"modelKey": SMALL}), 200)
    pace = {"X-Simulator-Pace-Ms": "200"}
    endless = CHAT | {"stream": True, "messages": [{"role": "user", "content": "count to 999"}]}
    described.check(gateway.post("/v1/chat/completions", CHAT), 200)
    with gateway.post("/v1/chat/completions", endless, headers=pace, stream=True) as running:
        described.check(running, 200)
        status = eventually(lambda: (s := gateway.get("/debug/status")).json()["inFlight"] and s)
        assert described.check(status, 200).json()["activeModel"]
        eventually(lambda: gateway.get("/debug/status").json()["recentRequests"])
        for view in views:
            described.check(gateway.get(view), 200)
    with gateway.get("/debug/stream?types=error&lastEventId=0", stream=True) as events:
        described.check(events, 200)
    described.check(gateway.get("/debug/stream?types=no-such-type"), 400)


def test_a_load_that_runs_is_described(gateway: Gateway, described: Description) -> None:
    body = {"modelKey": "llama-3.3-70b-instruct", "loadConfig": {"contextLength": 1024}}
    accept = {"Accept": "text/event-stream"}
    with gateway.post(LOAD, body, headers=accept, stream=True) as loading:
        described.check(loading, 200)
        status = eventually(lambda: (s := gateway.get("/debug/status")) and _loads(s) and s)
    described.check(status, 200)


def _loads(status: requests.Response) -> bool:
    operation = status.json()["currentOperation"]
    return operation is not None and operation["operation"] == "model_load"


@pytest.mark.parametrize("prefix", ["/v1", ""])
def test_responses_of_inference(gateway: Gateway, described: Description, prefix: str) -> None:
    described.check(gateway.post(f"{prefix}/chat/completions", CHAT | {"model": ""}), 400)
    for body in (CHAT, CHAT | {"stream": True}):
        described.check(gateway.post(f"{prefix}/chat/completions", body), 200)
        described.check(gateway.post(f"{prefix}/messages", body), 200)
    described.check(gateway.post(f"{prefix}/completions", {"model": SMALL, "prompt": "x"}), 200)
    described.check(gateway.post(f"{prefix}/responses", {"model": SMALL, "input": "x"}), 200)
    described.check(gateway.post(f"{prefix}/embeddings", {"model": EMBEDDING, "input": "x"}), 200)
    described.check(gateway.get(f"{prefix}/models"), 200)
    described.check(gateway.get(f"{prefix}/models/{SMALL}"), 200)


@pytest.mark.parametrize("path", ["/v1/nowhere", "/v1/chat/nowhere"])
def test_an_endpoint_that_lm_studio_lacks(
    gateway: Gateway, described: Description, path: str
) -> None:
    described.check(gateway.post(path, {}), 404)


PATHS = ["/v1/chat/completions", "/v1/messages", "/messages", "/api/v1/chat", LOAD]


@pytest.mark.parametrize("path", PATHS)
def test_rejected_requests_of_every_dialect(
    strict: Gateway, described: Description, path: str
) -> None:
    described.check(strict.post(path, {}), 401)
    large = {"model": "m" * LIMIT}
    described.check(strict.post(path, large, **bearer(ADMIN_KEY)), 413)
    if path in (LOAD, "/api/v1/chat"):
        described.check(strict.post(path, {}, **bearer(KEY)), 403)
    else:
        described.check(strict.post(path, {}, **bearer(KEY)), 400)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/messages"])
@pytest.mark.parametrize(
    ("fault", "status"),
    [({"X-Simulator-Head-Delay-Ms": "60000"}, 504), ({"X-Simulator-Fault": "garbage-head"}, 502)],
    ids=["silent", "broken"],
)
def test_failures_of_lm_studio(
    request: pytest.FixtureRequest,
    described: Description,
    path: str,
    fault: dict[str, str],
    status: int,
) -> None:
    target: Gateway = request.getfixturevalue("brief_timeout" if status == 504 else "gateway")
    described.check(target.post(path, CHAT, headers=fault), status)


def test_an_unreachable_lm_studio(unreachable: Gateway, described: Description) -> None:
    for path in PATHS:
        body = {"modelKey": SMALL} if path == LOAD else CHAT
        described.check(unreachable.post(path, body), 503)
    described.check(unreachable.get("/admin/models"), 503)
    described.check(unreachable.get("/health/ready"), 503)
    assert described.check(unreachable.get("/health"), 200).json()["status"] == "degraded"


def test_reading_the_document_needs_a_key_of_any_role(strict: Gateway, launch: Launch) -> None:
    admins_only = launch(GATEWAY_ADMIN_KEY=ADMIN_KEY, WEB_CONCURRENCY=1)
    for gateway, keys in ((strict, [KEY, ADMIN_KEY]), (admins_only, [ADMIN_KEY])):
        for path in ("/openapi.json", "/openapi.json/"):
            assert gateway.get(path).status_code == 401
        for key in keys:
            assert gateway.get("/openapi.json", **bearer(key)).json()["openapi"]
    assert KEY not in strict.get("/openapi.json", **bearer(KEY)).text
