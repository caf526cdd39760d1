"""Fixtures of all tests: a simulator for each module, and gateways in front of it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import anthropic
import httpx2
import openai
import pytest

from tests.nginx import Nginx
from tests.processes import Gateway, Simulator, default_signals_for_children, eventually
from tests.redis_server import RedisServer


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests marked ``both_servers`` under gunicorn and under gevent's own server."""
    if metafunc.definition.get_closest_marker("both_servers"):
        metafunc.parametrize("server", ["gunicorn", "gevent"], indirect=True, scope="module")


@pytest.fixture(scope="session", autouse=True)
def signals() -> None:
    """Let tests interrupt the processes they start, no matter how pytest itself was started.

    This is a fixture rather than a hook because pytest-xdist's controller must not run it: its
    workers would no longer ignore what the controller ignores.
    """
    default_signals_for_children()


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> str:
    """The server that the gateways run under: gunicorn, unless the test is parametrized."""
    return str(getattr(request, "param", "gunicorn"))


@pytest.fixture(scope="module")
def shared_simulator() -> Iterator[Simulator]:
    simulator = Simulator(0, "--pace-ms", "1")
    yield simulator
    simulator.stop()


@pytest.fixture
def simulator(shared_simulator: Simulator) -> Simulator:
    """The module's simulator, with nothing loaded, no faults and no records."""
    shared_simulator.reset()
    return shared_simulator


@pytest.fixture(scope="module")
def shared_gateway(
    server: str, shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path_factory.mktemp("gateway"), shared_simulator.url, server)
    yield gateway
    gateway.stop()


@pytest.fixture
def gateway(shared_gateway: Gateway, simulator: Simulator) -> Gateway:
    """The module's gateway (two workers under gunicorn, no keys), with no active model."""
    assert shared_gateway.post("/admin/models/deactivate").status_code == 200
    return shared_gateway


@pytest.fixture
def launch(server: str, tmp_path: Path, simulator: Simulator) -> Iterator[Callable[..., Gateway]]:
    """Starts gateways with any settings; they stop when the test ends."""
    started: list[Gateway] = []

    def start(lmstudio: str | None = None, **settings: Any) -> Gateway:
        folder = tmp_path / f"gateway-{len(started)}"
        started.append(Gateway(folder, lmstudio or simulator.url, server, **settings))
        return started[-1]

    yield start
    for gateway in started:
        gateway.stop()


@pytest.fixture(scope="module")
def shared_nginx(
    shared_gateway: Gateway, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Nginx]:
    front = Nginx(tmp_path_factory.mktemp("nginx"), shared_gateway.url)
    yield front
    front.stop()


@pytest.fixture(scope="module")
def shared_strict(
    server: str, shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    gateway = Gateway(
        tmp_path_factory.mktemp("strict"),
        shared_simulator.url,
        server,
        GATEWAY_API_KEY=SdkClient.KEY,
        GATEWAY_ADMIN_KEY=SdkClient.ADMIN_KEY,
        MAX_BODY_BYTES=100_000,
        WEB_CONCURRENCY=1,
    )
    yield gateway
    gateway.stop()


@pytest.fixture
def strict(shared_strict: Gateway, simulator: Simulator) -> Gateway:
    """A gateway with keys and a MAX_BODY_BYTES of 100 000."""
    return shared_strict


@pytest.fixture(scope="module")
def shared_brief_timeout(
    server: str, shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("brief_timeout")
    gateway = Gateway(folder, shared_simulator.url, server, PROXY_TIMEOUT=300, WEB_CONCURRENCY=1)
    yield gateway
    gateway.stop()


@pytest.fixture
def brief_timeout(shared_brief_timeout: Gateway, simulator: Simulator) -> Gateway:
    """A gateway with a PROXY_TIMEOUT of 0.3 s, for responses that never arrive in time.

    On a busy machine, any response may take that long.
    """
    return shared_brief_timeout


class SdkClient:
    """A client of a gateway from the openai or the anthropic package, without retries."""

    KEY = "inference-key-0123456789"
    ADMIN_KEY = "admin-key-0123456789abc"
    _ASK = {
        "model": "qwen2-1.5b-instruct",
        "messages": [{"role": "user", "content": "count to 3"}],
        "max_tokens": 50,
    }
    #: Status → exception of openai and of anthropic, ``error.type`` of OpenAI and of Anthropic.
    _ERRORS: dict[int, tuple[str, str, str]] = {
        400: ("BadRequestError", "invalid_request_error", "invalid_request_error"),
        401: ("AuthenticationError", "authentication_error", "authentication_error"),
        403: ("PermissionDeniedError", "permission_error", "permission_error"),
        404: ("NotFoundError", "invalid_request_error", "not_found_error"),
        413: ("APIStatusError", "invalid_request_error", "request_too_large"),
        429: ("RateLimitError", "requests", "rate_limit_error"),
        500: ("InternalServerError", "server_error", "api_error"),
        502: ("InternalServerError", "server_error", "api_error"),
        503: ("InternalServerError", "server_error", "overloaded_error"),
        504: ("InternalServerError", "server_error", "timeout_error"),
    }

    def __init__(self, dialect: str, url: str, key: str = KEY) -> None:
        self.dialect = dialect
        self.package: Any = anthropic if dialect == "anthropic" else openai
        self.url = url
        self.http: Any = httpx2.Client(trust_env=False, timeout=30)
        options: Any = {"api_key": key, "http_client": self.http, "max_retries": 0}
        if dialect == "anthropic":
            self.sdk: Any = anthropic.Anthropic(base_url=url, **options)
            self.path, self._create = "/v1/messages", self.sdk.messages.create
        else:
            self.sdk = openai.OpenAI(base_url=f"{url}/v1", **options)
            self.path, self._create = "/v1/chat/completions", self.sdk.chat.completions.create

    def ask(self, fault: str = "", headers: dict[str, str] | None = None, **changes: Any) -> Any:
        """Ask for a chat through the package's own API, with a fault of the simulator."""
        faults = {"X-Simulator-Fault": fault} if fault else {}
        return self._create(**{**self._ASK, **changes}, extra_headers={**faults, **(headers or {})})

    def post(self, content: Any, path: str = "") -> Any:
        """Send a body through the package that its API would not send."""
        options = {"headers": {"Content-Type": "application/json"}}
        target = self.url + (path or self.path)
        return self.sdk.post(target, content=content, cast_to=object, options=options)

    def raised(self, status: int, call: Callable[[], Any], code: str | None = None) -> Any:
        """The exception that a call raises.

        Checks that it has the package's class for this status, everything that each error must
        have, and OpenAI's ``code`` if one is given.
        """
        name, openai_type, anthropic_type = self._ERRORS[status]
        with pytest.raises(getattr(self.package, name)) as caught:
            call()
        error: Any = caught.value
        response = error.response
        assert error.status_code == response.status_code == status
        assert response.headers["x-request-id"]
        assert response.headers["content-type"].startswith("application/json")
        content = response.json()
        fields = content["error"]
        if str(response.request.url).endswith("/messages"):
            assert (set(content), content["type"]) == ({"type", "error"}, "error")
            assert fields["type"] == anthropic_type
        else:
            assert set(content) == {"error"}
            assert set(fields) == {"message", "type", "param", "code"}
            assert fields["type"] == openai_type
            assert code is None or fields["code"] == code
        message = str(error).replace("\\'", "'")  # anthropic shows the body's repr
        assert fields["message"] in message
        assert ("retry-after" in response.headers) == (status in (429, 503))
        return error


@pytest.fixture(params=["openai", "anthropic"])
def sdk(request: pytest.FixtureRequest) -> Iterator[Callable[..., SdkClient]]:
    """Makes clients of a gateway; the test runs once with each of the two packages."""
    made: list[SdkClient] = []

    def make(gateway: Gateway, key: str = SdkClient.KEY) -> SdkClient:
        made.append(SdkClient(request.param, gateway.url, key))
        return made[-1]

    yield make
    for client in made:
        client.http.close()


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A redis-server for the module. Tests are skipped where it is not installed, except in CI."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def state_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The module's shared state: all tests run once with SQLite and once with Redis."""
    if request.param == "redis":
        return str(request.getfixturevalue("redis_server").url)
    return f"sqlite:///{tmp_path_factory.mktemp('state')}/state.db"


class Frame(NamedTuple):
    """One received event; ``lines`` are its lines without line ends."""

    id: int
    event: str
    data: dict[str, Any]
    lines: list[str]


class EventReader:
    """A reader of /debug/stream in a thread of its own, which keeps everything it receives."""

    def __init__(
        self, gateway: Gateway, query: str = "", last_id: int | None = None, **headers: str
    ) -> None:
        self.frames: list[Frame] = []
        self.raw: list[str] = []
        self._connection = HTTPConnection("127.0.0.1", gateway.port, timeout=60)
        resume = {} if last_id is None else {"Last-Event-ID": str(last_id)}
        self._connection.request("GET", f"/debug/stream{query}", headers={**headers, **resume})
        # the response may take the socket away from its connection
        self._socket: socket.socket = self._connection.sock
        self.port: int = self._socket.getsockname()[1]
        self.response = self._connection.getresponse()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def of(self, event: str, **members: Any) -> list[dict[str, Any]]:
        """The data of all events of a type with these members."""
        wanted = members.items()
        return [f.data for f in self.frames if f.event == event and wanted <= f.data.items()]

    def until(self, event: str, count: int = 1, timeout: float = 30, **members: Any) -> Any:
        """Wait for ``count`` such events; returns the data of the last one."""
        eventually(lambda: len(self.of(event, **members)) >= count, timeout)
        return self.of(event, **members)[count - 1]

    def ended(self) -> bool:
        return not self._thread.is_alive()

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self.response.close()
        self._connection.close()

    def _read(self) -> None:
        lines: list[str] = []
        with suppress(OSError, HTTPException):
            while line := self.response.readline().decode():
                self.raw.append(line)
                if line != "\n":
                    lines.append(line.removesuffix("\n"))
                    continue
                fields = dict(one.split(": ", 1) for one in lines if not one.startswith(":"))
                if "data" in fields:
                    data = json.loads(fields["data"])
                    self.frames.append(Frame(int(fields["id"]), fields["event"], data, lines))
                lines = []


@pytest.fixture
def listen() -> Iterator[Callable[..., EventReader]]:
    """Opens readers of a gateway's event stream; they are closed when the test ends."""
    opened: list[EventReader] = []

    def start(gateway: Gateway, *arguments: Any, **options: Any) -> EventReader:
        opened.append(EventReader(gateway, *arguments, **options))
        return opened[-1]

    yield start
    for reader in opened:
        reader.close()
