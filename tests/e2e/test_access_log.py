"""The access log has one complete line per request in both formats, and clients can't forge any."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Gateway, Simulator, eventually

MODEL = "qwen2-1.5b-instruct"
KEY = "MARKER-key-0123456789abcdef"
INFERENCE = {"Authorization": f"Bearer {KEY}"}
MESSAGES = [{"role": "user", "content": "MARKER-prompt count to 4"}]
CHAT = "/v1/chat/completions"
MEMBERS = (
    {"level", "logger", "timestamp", "requestId", "client", "method", "path", "status", "bytes"}
    | {"totalMs", "modelAsked", "model", "stream", "queueMs", "ttftMs", "promptTokens"}
    | {"completionTokens", "cancelled"}
)
DETAILS = {"sentToLmStudioMs", "headMs", "firstByteMs", "endedMs"}
#: The members of a line about a request that is not an inference exchange.
PLAIN_MEMBERS = MEMBERS - (
    {"modelAsked", "model", "stream", "queueMs", "ttftMs", "promptTokens", "completionTokens"}
    | {"cancelled"}
)
Launch = Callable[..., Gateway]


class LoggingGateways:
    """Gateways by the format and the level of their log, each after a few requests."""

    def __init__(self, folder: Path, lmstudio: str) -> None:
        self._folder, self._lmstudio = folder, lmstudio
        self.started: dict[tuple[str, str], Gateway] = {}

    def __call__(self, form: str = "json", level: str = "info") -> Gateway:
        if (form, level) not in self.started:
            folder = self._folder / f"{form}-{level}"
            log = {"LOG_FORMAT": form, "LOG_LEVEL": level}
            keys = {"GATEWAY_API_KEY": f"alice:{KEY}", "WEB_CONCURRENCY": 1}
            gateway = Gateway(folder, self._lmstudio, **log, **keys)
            self.started[form, level] = gateway
            send_requests(gateway)
        return self.started[form, level]


@pytest.fixture(scope="module")
def gateways(shared_simulator: Simulator, tmp_path_factory: Any) -> Iterator[LoggingGateways]:
    gateways = LoggingGateways(tmp_path_factory.mktemp("logs"), shared_simulator.url)
    yield gateways
    for gateway in gateways.started.values():
        gateway.stop()


def named(request_id: str, **headers: str) -> dict[str, str]:
    """The headers of a request with this id."""
    return {**INFERENCE, "X-Request-Id": request_id, **headers}


def chat(gateway: Gateway, request_id: str, stream: bool = False, **headers: str) -> Any:
    body: dict[str, Any] = {"messages": MESSAGES, "stream": stream}
    return gateway.post(CHAT, body, headers=named(request_id, **headers))


def lines(gateway: Gateway) -> list[str]:
    return [line for line in gateway.logged().splitlines() if "gateway.access" in line]


def line_of(gateway: Gateway, request_id: str) -> str:
    """The only line of a request."""
    found: list[str] = eventually(lambda: [o for o in lines(gateway) if request_id in o], 20)
    assert len(found) == 1
    return found[0]


def send_requests(gateway: Gateway) -> None:
    activate = {"modelKey": MODEL}
    assert gateway.post("/admin/models/activate", activate, headers=named("of-activate")).ok
    assert chat(gateway, "of-plain").ok
    assert chat(gateway, "of-stream", stream=True).ok
    assert chat(gateway, "of-fault", **{"X-Simulator-Fault": "refuse-500"}).status_code == 500
    assert chat(gateway, "of-rejected", Authorization="Bearer MARKER-wrong").status_code == 401
    assert gateway.get("/health?key=MARKER-query", headers=named("of-health")).ok


def test_json_lines_have_the_documented_fields(gateways: LoggingGateways) -> None:
    gateway = gateways()
    plain, stream = (json.loads(line_of(gateway, one)) for one in ("of-plain", "of-stream"))
    for entry in (plain, stream):
        assert entry.keys() == MEMBERS
        assert (entry["client"], entry["method"], entry["path"]) == ("alice", "POST", CHAT)
        assert (entry["status"], entry["cancelled"]) == (200, False)
        assert (entry["modelAsked"], entry["model"]) == ("", MODEL)
        assert entry["completionTokens"] == 4
        assert entry["promptTokens"] > 0
        assert 0 < entry["queueMs"] <= entry["ttftMs"] <= entry["totalMs"]
        assert entry["bytes"] > 100
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["timestamp"])
    assert [plain["stream"], stream["stream"]] == [False, True]
    fault = json.loads(line_of(gateway, "of-fault"))
    assert (fault["status"], bool(fault["error"])) == (500, True)
    for name, status in (("of-activate", 200), ("of-rejected", 401), ("of-health", 200)):
        entry = json.loads(line_of(gateway, name))
        assert entry["status"] == status
        assert name == "of-rejected" or entry.keys() == PLAIN_MEMBERS
        # /health needs no key, so the gateway does not look at it
        assert entry["client"] == ("alice" if name == "of-activate" else "")


def test_text_lines_have_the_documented_fields(gateways: LoggingGateways) -> None:
    gateway = gateways("text")
    line = line_of(gateway, "of-stream")
    head, _, rest = line.partition(f" info gateway.access: POST {CHAT} ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", head)
    fields = dict(field.split("=", 1) for field in rest.split(" "))
    empty = {"modelAsked", "level", "logger", "timestamp", "method", "path"}
    assert fields.keys() == MEMBERS - empty
    assert fields["client"] == "alice"
    assert (fields["status"], fields["cancelled"], fields["stream"]) == ("200", "false", "true")
    assert (fields["model"], fields["completionTokens"]) == (MODEL, "4")
    for name in ("of-plain", "of-fault", "of-activate", "of-rejected", "of-health"):
        assert line_of(gateway, name)


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("level", ["info", "debug"])
def test_no_prompt_completion_or_key_is_logged(
    gateways: LoggingGateways, form: str, level: str
) -> None:
    gateway = gateways(form, level)
    gateway.http.post(
        gateway.url + CHAT,
        data='{"messages": "MARKER',
        timeout=20,
        headers=named("of-malformed"),
    )
    for name in ("plain", "stream", "fault", "rejected", "health", "malformed"):
        line_of(gateway, f"of-{name}")
    logged = gateway.logged()
    assert "MARKER" not in logged
    assert "1 2 3" not in logged


@pytest.mark.parametrize("form", ["text", "json"])
def test_debug_adds_the_time_of_each_step(gateways: LoggingGateways, form: str) -> None:
    gateway = gateways(form, "debug")
    line = line_of(gateway, "of-stream")
    if form == "json":
        entry = json.loads(line)
        assert entry.keys() == MEMBERS | DETAILS
    else:
        entry = {name: float(ms) for name, ms in re.findall(r"(\w+Ms)=([\d.]+)", line)}
    times = [entry[name] for name in ("sentToLmStudioMs", "headMs", "firstByteMs", "endedMs")]
    assert times == sorted(times)
    assert times[0] > 0


def test_above_info_no_lines_are_written(launch: Launch) -> None:
    gateway = launch(LOG_LEVEL="info", GATEWAY_API_KEY=f"alice:{KEY}", WEB_CONCURRENCY=1)
    assert gateway.get("/health", headers=INFERENCE).ok
    gateway.stop()
    assert len(lines(gateway)) == 1
    gateway.environ["LOG_LEVEL"] = "warn"
    # at this level gunicorn does not log its workers either: wait for a response instead
    gateway._is_up = gateway._answers  # type: ignore[method-assign]
    gateway.start()
    send_requests(gateway)
    gateway.stop()
    assert len(lines(gateway)) == 1


def send_raw(gateway: Gateway, target: bytes, *headers: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", gateway.port), 20) as client:
        head = [b"GET " + target + b" HTTP/1.1", b"Host: localhost", b"Connection: close"]
        head += [b"Authorization: Bearer " + KEY.encode(), *headers]
        client.sendall(b"\r\n".join([*head, b"", b""]))
        received = b""
        while piece := client.recv(65536):
            received += piece
    return received


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_client_cannot_forge_lines_or_send_terminal_codes(
    gateways: LoggingGateways, form: str
) -> None:
    gateway = gateways(form)
    forged = b"2026-01-01T00:00:00.000Z%20info%20gateway.access:%20FORGED"
    targets = [
        b"/v1/x%0a" + forged,
        b"/v1/x%0d%0a" + forged,
        b"/health%0a" + forged,
        b"/nowhere%0a" + forged,
        b"/nowhere%1b[31m" + forged,
        b"/nowhere%c2%9b31m" + forged,
        b"/nowhere%e2%80%a8" + forged,
        b"/nowhere%c2%85" + forged,
    ]
    for number, target in enumerate(targets):
        assert send_raw(gateway, target, b"X-Request-Id: odd-%d" % number)
        line_of(gateway, f"odd-{number}")
    send_raw(gateway, b"/health", b"X-Request-Id: \x1b[31mFORGED")
    body = {"model": "x\n2026 FORGED\x1b[31m\u2028\x85", "messages": MESSAGES}
    gateway.post(CHAT, body, headers=named("odd-model"))
    line_of(gateway, "odd-model")
    raw = gateway.log.read_bytes()
    assert b"\x1b" not in raw
    # many viewers break lines at the line separators of Unicode too
    text = raw.decode()
    assert text.splitlines() == text.rstrip("\n").split("\n")
    for line in text.splitlines():
        if form == "json":
            json.loads(line)
        else:
            assert re.match(r"\d{4}-\d\d-\d\dT\S+ \w+ (gateway|gunicorn)\.", line), line


def test_a_client_cannot_forge_fields(gateways: LoggingGateways) -> None:
    gateway = gateways("text")
    targets = [b"/v1/ok%20client=FORGED", b"/nowhere%20client=FORGED", b"/health%20client=FORGED"]
    for number, target in enumerate(targets):
        assert send_raw(gateway, target, b"X-Request-Id: field-%d" % number)
        line_of(gateway, f"field-{number}")
    send_raw(gateway, b"/health", b"X-Request-Id: a\tclient=FORGED")
    send_raw(gateway, b"/health", b"X-Request-Id: a client=FORGED")
    chat(gateway, "field-model", **{"X-Simulator-Fault": "refuse-500"})
    body = {"model": "x\tclient=FORGED", "messages": MESSAGES}
    gateway.post(CHAT, body, headers=named("field-model-2"))
    line_of(gateway, "field-model-2")
    for line in lines(gateway):
        unquoted = re.sub(r'"(?:[^"\\]|\\.)*"', '""', line)
        assert "FORGED" not in re.findall(r"[\s\x85]client=(\S+)", unquoted), line
