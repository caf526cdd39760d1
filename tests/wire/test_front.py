"""The paths that skip Flask follow the same rules as those that Flask dispatches."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest

from gateway import settings
from gateway.app import create_app
from gateway.front import HOT_PATHS, Front

NEW, ADMIN = "new-key-0123456789", "admin-key-0123456789"
ORIGIN = "https://app.example"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


_KEYS = {"": {}, "wrong": bearer("wrong"), "good": bearer(NEW), "admin": bearer(ADMIN),
         "x": {"X-API-Key": NEW}}  # fmt: skip
_PREFLIGHT = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
_SHAPES: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "post": ("POST", {}, {}),
    "not json": ("POST", {}, {"body": b"{"}),
    "get": ("GET", {}, {}),
    "unknown method": ("BREW", {}, {}),
    "too large": ("POST", {"Content-Length": "999999"}, {}),
    "preflight": ("OPTIONS", _PREFLIGHT, {}),
    "foreign preflight": ("OPTIONS", _PREFLIGHT | {"Origin": "https://evil.example"}, {}),
    "origin": ("POST", {"Origin": ORIGIN}, {}),
    "request id": ("POST", {"X-Request-Id": "mine"}, {}),
    "not allowed": ("POST", {}, {"REMOTE_ADDR": "8.8.8.8"}),
    "forged": ("POST", {"X-Forwarded-For": "127.0.0.1"}, {"REMOTE_ADDR": "8.8.8.8"}),
    "proxied": ("POST", {"X-Forwarded-For": "8.8.8.8"}, {"REMOTE_ADDR": "10.0.0.1"}),
    "encoded": ("POST", {}, {"RAW_URI": "/v1/chat%2fcompletions"}),
    "traversal": ("POST", {}, {"RAW_URI": "/v1/chat/../completions"}),
}


@pytest.fixture(scope="module")
def both_routes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The application as it is, and one in which Flask dispatches the busiest paths too."""
    configured = settings.load(
        {
            "LMSTUDIO_BASE_URL": "http://127.0.0.1:9",
            "STATE_URL": f"sqlite:///{tmp_path_factory.mktemp('routes')}/state.db",
            "GATEWAY_API_KEY": NEW,
            "GATEWAY_ADMIN_KEY": ADMIN,
            "CORS_ORIGINS": ORIGIN,
            "IP_ALLOWLIST": "127.0.0.1",
            "TRUSTED_PROXIES": "10.0.0.0/8",
            "MAX_BODY_BYTES": "1000",
        }
    )
    hot = create_app(configured).wsgi_app
    assert isinstance(hot, Front)
    through_flask = copy.copy(hot)
    through_flask.hot_paths = frozenset()
    return hot, through_flask


@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("path", sorted(HOT_PATHS))
def test_a_path_that_skips_flask_follows_the_same_rules(
    both_routes: tuple[Any, Any], path: str, shape: str
) -> None:
    method, headers, more = _SHAPES[shape]
    for name, key in _KEYS.items():
        direct, dispatched = (call(app, method, path, headers | key, **more) for app in both_routes)
        assert direct == dispatched, name
        assert direct[0] != "500", direct


def call(app: Any, method: str, path: str, headers: dict[str, str], **more: Any) -> Any:
    """Status, headers and body of a response, without what differs between requests."""
    body = more.pop("body", b'{"model": "m", "messages": []}')
    environ = {
        "REQUEST_METHOD": method, "PATH_INFO": path, "RAW_URI": path, "QUERY_STRING": "",
        "SERVER_NAME": "gateway", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "gateway", "REMOTE_ADDR": "127.0.0.1", "SCRIPT_NAME": "",
        "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(body), "wsgi.errors": io.StringIO(),
        "wsgi.input_terminated": True, "CONTENT_LENGTH": str(len(body)),
        "CONTENT_TYPE": "application/json",
    }  # fmt: skip
    for name, value in headers.items():
        key = name.upper().replace("-", "_")
        environ[key if key == "CONTENT_LENGTH" else f"HTTP_{key}"] = value
    environ |= more
    started: list[Any] = []
    response = app(environ, lambda status, fields: started.append((status, fields)))
    content = b"".join(response)
    getattr(response, "close", lambda: None)()
    status, fields = started[0]
    kept = sorted((name.lower(), value) for name, value in fields if not value.startswith("req_"))
    return status[:3], kept, content
