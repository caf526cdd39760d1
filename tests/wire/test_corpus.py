"""Every case of the corpus against real gateways: directly under both servers, and behind nginx."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.nginx import Nginx
from tests.processes import Gateway, Simulator, eventually
from tests.wire import case as corpus
from tests.wire.case import Case
from tests.wire.client import ENDING, QUIET, WAITING, Answer, Client

KEY, ADMIN_KEY = "wire-key-0123456789", "wire-admin-0123456789"
KEYS = {"GATEWAY_API_KEY": KEY, "GATEWAY_ADMIN_KEY": ADMIN_KEY}
COMMON = {"MAX_BODY_BYTES": 100_000, "CORS_ORIGINS": "https://app.example"}
ALLOWED = {"IP_ALLOWLIST": "10.0.0.0/8", "WEB_CONCURRENCY": 1}
#: The gateways that cases name.
SETTINGS = {
    "keyed": KEYS,
    "open": {"WEB_CONCURRENCY": 1},
    "adminonly": {"GATEWAY_ADMIN_KEY": ADMIN_KEY, "WEB_CONCURRENCY": 1},
    "walled": ALLOWED,
    "proxied": {**ALLOWED, "TRUSTED_PROXIES": "127.0.0.0/8"},
}
CASES = corpus.load()
#: What the gateway runs under, and how clients come to it.
WAYS = [("gunicorn", "direct"), ("gunicorn", "nginx"), ("gevent", "direct")]


class Place:
    """A gateway, the nginx in front of it, and the workers that it began with."""

    def __init__(self, folder: Path, lmstudio: str, server: str, **settings: object) -> None:
        self.gateway = Gateway(folder, lmstudio, server, **COMMON, **settings)
        self.nginx = Nginx(folder / "nginx", self.gateway.url)
        self.workers = self.gateway.workers()

    def port(self, way: str) -> int:
        return self.gateway.port if way == "direct" else self.nginx.port

    def stop(self) -> None:
        self.nginx.stop()
        self.gateway.stop()


@pytest.fixture(scope="module")
def places(
    server: str, shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Place]]:
    root = tmp_path_factory.mktemp("wire")
    with ThreadPoolExecutor(len(SETTINGS)) as pool:
        made = {
            name: pool.submit(Place, root / name, shared_simulator.url, server, **settings)
            for name, settings in SETTINGS.items()
        }
    found = {name: future.result() for name, future in made.items()}
    yield found
    for place in found.values():
        place.stop()


def matches(answer: str | None, expected: frozenset[str]) -> bool:
    return (answer or "closed") in expected


def take(client: Client, expected: corpus.Expected) -> list[Answer]:
    """The answers, which must be those that are expected and no more."""
    answers: list[Answer] = []
    for place in expected:
        if "waits" in place and client.silent(WAITING):
            return answers
        if "headless" in place:
            answers.append(client.headless())
            return answers
        answer = client.read()
        assert matches(answer and answer.status, place), (
            f"answer {len(answers) + 1} is not {'|'.join(sorted(place))}: {answer}"
        )
        if answer is None:
            return answers
        answers.append(answer)
    assert client.silent(QUIET), f"one more answer than expected: {client.read()}"
    return answers


def reached(simulator: Simulator) -> list[dict[str, object]]:
    """What has come to LM Studio, without the gateway's own questions for its health."""
    return [one for one in simulator.requests() if one["target"] != "/lmstudio-greeting"]


def wire(record: dict[str, object]) -> str:
    """A request that LM Studio has got, as text."""
    lines = [f"{record['method']} {record['target']} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in record["headers"]]
    return "\n".join(lines)


def lives(place: Place) -> bool:
    headers = {"X-Forwarded-For": "10.0.0.1"}
    answer = place.gateway.get("/health", headers=headers)
    walled = "IP_ALLOWLIST" in place.gateway.environ
    assert answer.status_code in ((200, 403) if walled else (200,)), answer.text
    return place.gateway.workers() == place.workers


@pytest.mark.parametrize(("server", "way"), WAYS, indirect=["server"], scope="module")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_wire(case: Case, way: str, places: dict[str, Place], simulator: Simulator) -> None:
    place = places[case.gateway]
    expected = case.status if way == "direct" else case.nginx
    with Client(place.port(way)) as client:
        client.send(case.data)
        answers = [] if case.closes else take(client, expected)
        if way == "direct" and answers and "waits" not in expected[-1]:
            says = answers[-1].header("Connection") == "close"
            assert says == client.ends(ENDING), answers[-1]
    sent_on = reached(simulator)
    if case.upstream is not None and (way == "direct" or case.nginx == case.status):
        assert len(sent_on) == case.upstream, sent_on
    on_the_way = [wire(one) for one in sent_on]
    # what nginx says by itself is its own affair
    if answers and (way == "direct" or answers[-1].header("X-Request-Id")):
        for text in case.contains:
            assert text.encode() in answers[-1].raw, answers[-1]
    for text in (*case.lacks, *(case.lacks_directly if way == "direct" else ())):
        assert not any(text.encode() in one.raw for one in answers), answers
        assert not any(text.lower() in one.lower() for one in on_the_way), on_the_way
    assert not any(KEY in one or ADMIN_KEY in one for one in on_the_way), on_the_way
    assert lives(place), "a worker was restarted"


@pytest.mark.both_servers
def test_every_refusal_is_a_json_error_and_no_html_page(places: dict[str, Place]) -> None:
    pages, other = [], []
    for case in CASES:
        if case.closes or "waits" in case.status[-1]:
            continue
        with Client(places[case.gateway].port("direct")) as client:
            client.send(case.data)
            answers = []
            while len(answers) < len(case.status) and (answer := client.read()):
                answers.append(answer)
        for answer in answers:
            if b"<html" in answer.raw.lower():
                pages.append(case.name)
            elif answer.status >= "400" and not (
                answer.body.startswith(b"{") and answer.header("X-Request-Id")
            ):
                other.append(case.name)
    assert (pages, other) == ([], [])


@pytest.mark.both_servers
def test_no_case_leaves_a_traceback_or_a_key_in_the_log(places: dict[str, Place]) -> None:
    for name, place in places.items():
        log = place.gateway.logged()
        assert "Traceback" not in log, f"{name}: {log[log.index('Traceback') - 500 :][:4000]}"
        assert KEY not in log, name
        assert ADMIN_KEY not in log, name


@pytest.mark.both_servers
def test_no_worker_died_of_the_corpus(places: dict[str, Place]) -> None:
    for place in places.values():
        eventually(lambda place=place: lives(place))


def test_the_corpus_has_at_least_80_cases() -> None:
    assert len(CASES) >= 80
