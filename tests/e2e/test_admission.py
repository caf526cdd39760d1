"""Who is admitted, under real gunicorn: addresses, keys, roles and preflights."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Gateway, Simulator, free_port

Launch = Callable[..., Gateway]
OLD, NEW, ADMIN = "old-key-0123456789", "new-key-0123456789", "admin-key-0123456789"
ORIGIN = "https://app.example"
CHAT = "/v1/chat/completions"
#: A path of every API, and its dialect.
SURFACES = {
    "/v1/models": "openai",
    CHAT: "openai",
    "/chat/completions": "openai",
    "/models": "openai",
    "/v1/messages": "anthropic",
    "/messages": "anthropic",
    "/api/v0/models": "openai",
    "/admin/models": "admin",
    "/debug/status": "admin",
    "/metrics": "admin",
    "/openapi.json": "admin",
    "/nowhere": "admin",
}
ADMIN_PATHS = [
    ("GET", "/admin/models"),
    *(("POST", f"/admin/models/{verb}") for verb in ("load", "unload", "activate", "deactivate")),
    ("GET", "/debug/status"),
    ("GET", "/debug/metrics"),
    ("GET", "/debug/stream"),
    ("GET", "/metrics"),
    ("GET", "/api/v0/models"),
    ("GET", "/api/v1/models"),
    ("POST", "/api/v1/chat"),
]


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("gateway", timeout=60)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


def ask(where: Any, method: str, path: str, headers: dict[str, str] | None = None,
        body: bytes | None = None) -> tuple[int, http.client.HTTPMessage, bytes]:  # fmt: skip
    """Send one request with exactly these headers, to a gateway or over a connection."""
    if isinstance(where, Gateway):
        where = (
            UnixConnection(where.unix)
            if where.unix
            else http.client.HTTPConnection("127.0.0.1", where.port, timeout=60)
        )
    try:
        where.request(method, path, body, headers or {})
        response = where.getresponse()
        endless = response.headers.get_content_type() == "text/event-stream"
        return response.status, response.headers, b"" if endless else response.read()
    finally:
        where.close()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def check_dialect(dialect: str, content: bytes, code: str | None) -> None:
    body = json.loads(content)
    if dialect == "admin":
        assert isinstance(body["error"], str)
        assert body["requestId"]
        assert set(body) <= {"error", "details", "requestId"}
    elif dialect == "anthropic":
        assert set(body) == {"type", "error"}
        assert set(body["error"]) == {"type", "message"}
    else:
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert code is None or body["error"]["code"] == code


@pytest.fixture(scope="module")
def keyed(
    shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    gateway = Gateway(
        tmp_path_factory.mktemp("keyed"),
        shared_simulator.url,
        GATEWAY_API_KEY=f"old:{OLD},new:{NEW}",
        GATEWAY_ADMIN_KEY=f"operator:{ADMIN}",
        CORS_ORIGINS=f"{ORIGIN},https://other.example",
        MAX_BODY_BYTES=1000,
    )
    yield gateway
    gateway.stop()


# keys and roles


@pytest.mark.parametrize("path", SURFACES)
def test_a_request_without_a_key_gets_401_in_the_dialect_of_its_path(
    keyed: Gateway, path: str
) -> None:
    for headers in ({}, bearer("wrong"), {"X-API-Key": "wrong"}):
        status, head, content = ask(keyed, "GET", path, headers)
        assert (status, head["WWW-Authenticate"]) == (401, "Bearer")
        assert head["X-Request-Id"]
        check_dialect(SURFACES[path], content, "invalid_api_key")


@pytest.mark.parametrize("key", [OLD, NEW, ADMIN])
def test_every_key_opens_inference_in_either_header(
    keyed: Gateway, simulator: Simulator, key: str
) -> None:
    for headers in (bearer(key), {"X-API-Key": key}, {"Authorization": f"bearer {key}"}):
        assert ask(keyed, "GET", "/v1/models", headers)[0] == 200
        assert ask(keyed, "GET", "/models", headers)[0] == 200


@pytest.mark.parametrize(("method", "path"), ADMIN_PATHS)
def test_an_inference_key_gets_403_on_every_admin_path(
    keyed: Gateway, method: str, path: str
) -> None:
    for variant in (path, path + "?x=1", path + "/", "/" + path, path.replace("m", "%6d", 1)):
        status, _, content = ask(keyed, method, variant, bearer(NEW))
        # a variant that is not a path of the API may get a 404
        assert status in ((403,) if variant in (path, path + "?x=1") else (400, 403, 404)), variant
        if variant == path:
            dialect = "openai" if path.startswith("/api") else "admin"
            check_dialect(dialect, content, "admin_key_required")


@pytest.mark.parametrize(("method", "path"), [("GET", p) for _, p in ADMIN_PATHS if "str" not in p])
def test_an_admin_key_is_accepted_on_every_admin_path(
    keyed: Gateway, simulator: Simulator, method: str, path: str
) -> None:
    assert ask(keyed, method, path, bearer(ADMIN))[0] not in (401, 403, 500)


def test_events_contain_the_name_of_the_key_but_not_the_key(
    keyed: Gateway, simulator: Simulator
) -> None:
    body = b'{"model": "qwen2-1.5b-instruct", "messages": []}'
    url = f"{keyed.url}/debug/stream?types=inference_start"
    with keyed.http.get(url, headers=bearer(ADMIN), stream=True, timeout=60) as events:
        lines = events.iter_lines()
        assert next(lines)
        assert ask(keyed, "POST", CHAT, bearer(OLD), body)[0] < 500
        event = next(line for line in lines if b'"client"' in line)
    assert json.loads(event.partition(b":")[2])["client"] == "old"
    assert OLD.encode() not in event


def test_removing_a_key_leaves_the_other_one_valid(launch: Launch) -> None:
    before = launch(GATEWAY_API_KEY=f"old:{OLD},new:{NEW}", WEB_CONCURRENCY=1)
    assert [ask(before, "GET", "/v1/models", bearer(key))[0] for key in (OLD, NEW)] == [200, 200]
    after = launch(GATEWAY_API_KEY=f"new:{NEW}", WEB_CONCURRENCY=1)
    assert [ask(after, "GET", "/v1/models", bearer(key))[0] for key in (OLD, NEW)] == [401, 200]


def test_an_admin_key_alone_leaves_inference_open_and_nothing_else(launch: Launch) -> None:
    gateway = launch(GATEWAY_ADMIN_KEY=ADMIN, WEB_CONCURRENCY=1)
    assert ask(gateway, "GET", "/v1/models")[0] == 200
    for method, path in ADMIN_PATHS:
        for variant in (path, "/" + path, "//" + path):
            status, _, _ = ask(gateway, method, variant)
            assert status in ((401,) if variant == path else (400, 401, 404)), variant


# health


def test_health_needs_no_key(keyed: Gateway) -> None:
    for path in ("/health", "/health/ready"):
        assert ask(keyed, "GET", path)[0] == 200
    assert ask(keyed, "GET", "/healthy")[0] == 401


def test_health_needs_any_key_if_the_settings_say_so(launch: Launch) -> None:
    gateway = launch(GATEWAY_API_KEY=NEW, GATEWAY_ADMIN_KEY=ADMIN, REQUIRE_AUTH_FOR_HEALTH="true")
    for path in ("/health", "/health/ready"):
        status, head, content = ask(gateway, "GET", path)
        assert (status, head["WWW-Authenticate"]) == (401, "Bearer")
        check_dialect("admin", content, None)
        assert [ask(gateway, "GET", path, bearer(key))[0] for key in (NEW, ADMIN)] == [200, 200]


# addresses


@pytest.mark.parametrize(
    ("allowed", "status"),
    [("127.0.0.1", 200), ("127.0.0.0/8", 200), ("::1", 403),
     ("10.0.0.0/8,192.168.0.0/16", 403), ("*", 200)],
)  # fmt: skip
def test_the_allowlist_is_checked_before_the_key(launch: Launch, allowed: str, status: int) -> None:
    gateway = launch(IP_ALLOWLIST=allowed, GATEWAY_API_KEY=NEW, WEB_CONCURRENCY=1)
    assert ask(gateway, "GET", "/v1/models", bearer(NEW))[0] == status
    forged = {"X-Forwarded-For": "10.1.2.3", "X-Real-IP": "10.1.2.3", **bearer(NEW)}
    assert ask(gateway, "GET", "/v1/models", forged)[0] == status
    if status == 403:
        for path, dialect in SURFACES.items():
            rejected, _, content = ask(gateway, "GET", path)
            assert rejected == 403
            check_dialect(dialect, content, "ip_not_allowed")


def test_the_allowlist_matches_ipv6_and_mapped_peers(launch: Launch) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("::1 is not usable here")
    for listen, allowed, peer, status in (
        ("::1", "::1", "::1", 200),
        ("::1", "127.0.0.1", "::1", 403),
        ("::", "127.0.0.0/8", "127.0.0.1", 200),
    ):
        gateway = launch_v6(launch, listen, free_port(), allowed)
        connection = http.client.HTTPConnection(peer, gateway.port, timeout=60)
        assert ask(connection, "GET", "/v1/models", bearer(NEW))[0] == status, (listen, allowed)


def launch_v6(launch: Launch, host: str, port: int, allowed: str) -> Gateway:
    class V6(Gateway):
        def _answers(self) -> bool:
            with socket.socket(socket.AF_INET6) as probe:
                return probe.connect_ex(("::1", self.port)) == 0

    plain = launch(WEB_CONCURRENCY=1)
    environ = {name: plain.environ[name] for name in ("LMSTUDIO_BASE_URL", "STATE_URL")}
    plain.stop()
    gateway = V6(
        plain.folder, environ["LMSTUDIO_BASE_URL"], GATEWAY_HOST=host, GATEWAY_PORT=port,
        IP_ALLOWLIST=allowed, GATEWAY_API_KEY=NEW, WEB_CONCURRENCY=1,
    )  # fmt: skip
    plain.process = gateway.process  # the launch fixture stops it
    return gateway


@pytest.mark.parametrize(
    ("trusted", "allowed", "forwarded", "status"),
    [
        ("", "10.0.0.0/8", "10.1.2.3", 403),
        ("unix", "10.0.0.0/8", "10.1.2.3", 200),
        ("unix", "10.0.0.0/8", "10.1.2.3, 8.8.8.8", 403),
        ("unix,8.8.8.8", "10.0.0.0/8", "10.1.2.3, 8.8.8.8", 200),
        ("unix", "10.0.0.0/8", "", 200),
        ("", "*", "", 200),
        ("", "127.0.0.1", "127.0.0.1", 403),
    ],
)
def test_a_peer_on_a_unix_socket_is_a_proxy_only_if_unix_is_trusted(
    launch: Launch, tmp_path: Path, trusted: str, allowed: str, forwarded: str, status: int
) -> None:
    gateway = launch(
        GATEWAY_HOST=f"unix:{tmp_path}/gateway.sock", GATEWAY_API_KEY=NEW, WEB_CONCURRENCY=1,
        TRUSTED_PROXIES=trusted, IP_ALLOWLIST=allowed,
    )  # fmt: skip
    headers = {**bearer(NEW), **({"X-Forwarded-For": forwarded} if forwarded else {})}
    assert ask(gateway, "GET", "/v1/models", headers)[0] == status


# CORS and other rejections


@pytest.mark.parametrize("path", SURFACES)
def test_a_preflight_from_an_allowed_origin_needs_no_key(keyed: Gateway, path: str) -> None:
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    status, head, content = ask(keyed, "OPTIONS", path, headers)
    assert (status, content) == (204, b"")
    assert head.get_all("Access-Control-Allow-Origin") == [ORIGIN]
    assert "Origin" in head["Vary"]
    for other in ("https://evil.example", "null", ORIGIN + ".evil.example", ORIGIN + ":8443"):
        status, head, _ = ask(keyed, "OPTIONS", path, headers | {"Origin": other})
        assert (status, head["Access-Control-Allow-Origin"]) == (401, None)


@pytest.mark.parametrize("path", SURFACES)
def test_an_unknown_method_and_a_large_body_get_errors_in_the_dialect_too(
    keyed: Gateway, simulator: Simulator, path: str
) -> None:
    length = {"Content-Length": "1001", "Content-Type": "application/json"}
    status, _, content = ask(keyed, "POST", path, bearer(ADMIN) | length)
    assert status == 413
    check_dialect(SURFACES[path], content, "body_too_large")
    status, head, content = ask(keyed, "BREW", path, bearer(ADMIN))
    assert status in (404, 405)
    assert status == 404 or head["Allow"]
    check_dialect(SURFACES[path], content, None)
