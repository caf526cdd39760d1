"""Every case of the corpus against real gateways: under both servers, and behind nginx."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.nginx import Nginx
from tests.processes import Gateway, Simulator, eventually
from tests.wire import case as corpus
from tests.wire.case import Case
from tests.wire.client import QUIET, STAYING, WAITING, Client, Response

KEY, ADMIN_KEY = "wire-key-0123456789", "wire-admin-0123456789"
KEYS = {"GATEWAY_API_KEY": KEY, "GATEWAY_ADMIN_KEY": ADMIN_KEY}
COMMON = {"MAX_BODY_BYTES": 100_000, "CORS_ORIGINS": "https://app.example"}
ALLOWED = {"IP_ALLOWLIST": "10.0.0.0/8", "WEB_CONCURRENCY": 1}
#: The gateways of the cases, by the name in their ``gateway`` field.
SETTINGS = {
    "keyed": KEYS,
    "open": {"WEB_CONCURRENCY": 1},
    "admin-only": {"GATEWAY_ADMIN_KEY": ADMIN_KEY, "WEB_CONCURRENCY": 1},
    "guarded": {
        "GATEWAY_ADMIN_KEY": ADMIN_KEY,
        "REQUIRE_AUTH_FOR_HEALTH": "true",
        "WEB_CONCURRENCY": 1,
    },
    "allowlist": ALLOWED,
    "proxied": {**ALLOWED, "TRUSTED_PROXIES": "127.0.0.0/8"},
}
CASES = corpus.load()
#: The server that runs the gateway, and how clients connect to it.
ROUTES = [("gunicorn", "direct"), ("gunicorn", "nginx"), ("gevent", "direct")]


class Deployment:
    """A gateway, the nginx in front of it, and the workers that it started with."""

    def __init__(self, folder: Path, lmstudio: str, server: str, **settings: object) -> None:
        self.gateway = Gateway(folder, lmstudio, server, **COMMON, **settings)
        self.nginx = Nginx(folder / "nginx", self.gateway.url)
        self.workers = self.gateway.workers()

    def port(self, route: str) -> int:
        return self.gateway.port if route == "direct" else self.nginx.port

    def stop(self) -> None:
        self.nginx.stop()
        self.gateway.stop()


@pytest.fixture(scope="module")
def deployments(
    server: str, shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Deployment]]:
    root = tmp_path_factory.mktemp("wire")
    with ThreadPoolExecutor(len(SETTINGS)) as pool:
        starting = {
            name: pool.submit(Deployment, root / name, shared_simulator.url, server, **settings)
            for name, settings in SETTINGS.items()
        }
    started = {name: future.result() for name, future in starting.items()}
    yield started
    for deployment in started.values():
        deployment.stop()


def read_expected(client: Client, expected: corpus.Expected) -> list[Response]:
    """Read the expected responses, and check that there are no others."""
    responses: list[Response] = []
    for statuses in expected:
        if "waits" in statuses and client.is_silent(WAITING):
            return responses
        if "headless" in statuses:
            responses.append(client.headless())
            return responses
        response = client.read()
        assert (response.status if response else "closed") in statuses, (
            f"response {len(responses) + 1} is not {'|'.join(sorted(statuses))}: {response}"
        )
        if response is None:
            return responses
        responses.append(response)
    assert client.is_silent(QUIET), f"an unexpected response: {client.read()}"
    return responses


def received_by(simulator: Simulator) -> list[dict[str, object]]:
    """The requests that reached LM Studio, except for the gateway's own health checks."""
    return [one for one in simulator.requests() if one["target"] != "/lmstudio-greeting"]


def wire(record: dict[str, object]) -> str:
    """The head of a request that LM Studio received, as text."""
    lines = [f"{record['method']} {record['target']} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in record["headers"]]
    return "\n".join(lines)


def is_alive(deployment: Deployment) -> bool:
    """Whether the gateway responds, with the workers that it started with."""
    gateway = deployment.gateway
    headers = {"X-Forwarded-For": "10.0.0.1", "X-API-Key": ADMIN_KEY}
    response = gateway.get("/health", headers=headers)
    statuses = (200, 403) if "IP_ALLOWLIST" in gateway.environ else (200,)
    assert response.status_code in statuses, response.text
    return gateway.workers() == deployment.workers


@pytest.mark.parametrize(("server", "route"), ROUTES, indirect=["server"], scope="module")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(
    case: Case, route: str, deployments: dict[str, Deployment], simulator: Simulator
) -> None:
    deployment = deployments[case.gateway]
    direct = route == "direct"
    expected = case.status if direct else case.nginx
    with Client(deployment.port(route)) as client:
        client.send(case.data)
        if case.closes:
            client.finish()
        responses = read_expected(client, expected)
        if direct and responses and "waits" not in expected[-1]:
            if responses[-1].header("Connection") == "close":
                assert client.is_closed(), responses[-1]
            elif not case.closes:
                assert not client.is_closed(STAYING), responses[-1]
    if case.upstream and direct:
        eventually(lambda: len(received_by(simulator)) >= (case.upstream or 0))
    forwarded = received_by(simulator)
    if case.upstream is not None and (direct or case.nginx == case.status):
        assert len(forwarded) == case.upstream, forwarded
    heads = [wire(one) for one in forwarded]
    # a response of nginx's own has no request id
    if responses and (direct or responses[-1].header("X-Request-Id")):
        for text in case.contains:
            assert text.encode() in responses[-1].raw, responses[-1]
    for text in (*case.lacks, *(case.lacks_directly if direct else ())):
        assert not any(text.encode() in one.raw for one in responses), responses
        assert not any(text.lower() in head.lower() for head in heads), heads
    assert not any(KEY in head or ADMIN_KEY in head for head in heads), heads
    assert is_alive(deployment), "a worker was restarted"


@pytest.mark.both_servers
def test_every_rejection_is_a_json_error_and_never_an_html_page(
    deployments: dict[str, Deployment],
) -> None:
    pages, other = [], []
    for case in CASES:
        if case.closes or "waits" in case.status[-1]:
            continue
        with Client(deployments[case.gateway].port("direct")) as client:
            client.send(case.data)
            responses = []
            while len(responses) < len(case.status) and (response := client.read()):
                responses.append(response)
        for response in responses:
            if b"<html" in response.raw.lower():
                pages.append(case.name)
            elif response.status >= "400" and not (
                response.body.startswith(b"{") and response.header("X-Request-Id")
            ):
                other.append(case.name)
    assert (pages, other) == ([], [])


@pytest.mark.both_servers
def test_no_case_leaves_a_traceback_or_a_key_in_the_log(
    deployments: dict[str, Deployment],
) -> None:
    for name, deployment in deployments.items():
        log = deployment.gateway.logged()
        assert "Traceback" not in log, f"{name}: {log[log.index('Traceback') - 500 :][:4000]}"
        assert KEY not in log, name
        assert ADMIN_KEY not in log, name


@pytest.mark.both_servers
def test_no_worker_dies_of_the_corpus(deployments: dict[str, Deployment]) -> None:
    for deployment in deployments.values():
        eventually(lambda deployment=deployment: is_alive(deployment))


def test_the_corpus_has_at_least_80_cases() -> None:
    assert len(CASES) >= 80
