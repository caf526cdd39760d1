"""Access: who is admitted, checked on handmade WSGI environs."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.errors import Forbidden, GatewayError, Unauthorized, UnsupportedMediaType
from gateway.request import CLIENT, REQUEST_ID, Access
from gateway.settings import load


def access(**settings: str) -> Access:
    return Access(load(settings))


def environ(path: str = "/v1/models", peer: str = "127.0.0.1", **extra: Any) -> dict[str, Any]:
    return {"REQUEST_METHOD": "GET", "PATH_INFO": path, "REMOTE_ADDR": peer, **extra}


def client_of(gate: Access, environ: dict[str, Any]) -> str:
    gate.admit(environ)
    return str(environ[CLIENT])


def bearer(key: str) -> dict[str, str]:
    return {"HTTP_AUTHORIZATION": f"Bearer {key}"}


def is_admitted(gate: Access, environ: dict[str, Any]) -> bool:
    code = None
    try:
        gate.admit(environ)
    except Forbidden as error:
        code = error.code
    assert code in (None, "ip_not_allowed")
    return code is None


# Keys


@pytest.mark.parametrize(
    "headers",
    [
        {"HTTP_AUTHORIZATION": "Bearer s3cr3t"},
        {"HTTP_AUTHORIZATION": "bearer   s3cr3t "},
        {"HTTP_X_API_KEY": "s3cr3t"},
        {"HTTP_AUTHORIZATION": "Basic dXNlcg==", "HTTP_X_API_KEY": "s3cr3t"},
        {"HTTP_AUTHORIZATION": "Bearer wrong", "HTTP_X_API_KEY": "s3cr3t"},
    ],
)
def test_either_header_may_carry_the_key(headers: dict[str, str]) -> None:
    assert client_of(access(GATEWAY_API_KEY="app:s3cr3t"), environ(**headers)) == "app"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"HTTP_AUTHORIZATION": "Bearer"},
        {"HTTP_AUTHORIZATION": "Bearer "},
        {"HTTP_AUTHORIZATION": "s3cr3t"},
        {"HTTP_AUTHORIZATION": "Basic s3cr3t"},
        {"HTTP_AUTHORIZATION": "Bearer s3cr3t2"},
        {"HTTP_AUTHORIZATION": "Bearer s3cr3"},
        {"HTTP_AUTHORIZATION": "Bearer S3CR3T"},
        {"HTTP_AUTHORIZATION": "Bearer app:s3cr3t"},
        {"HTTP_X_API_KEY": ""},
        {"HTTP_X_API_KEY": "\xff\xfe"},
        {"HTTP_X_API_KEY": "\udcff"},
    ],
)
def test_a_wrong_or_missing_key_is_401(headers: dict[str, str]) -> None:
    with pytest.raises(Unauthorized) as caught:
        access(GATEWAY_API_KEY="app:s3cr3t").admit(environ(**headers))
    assert caught.value.headers == [("WWW-Authenticate", "Bearer")]
    assert "s3cr3" not in caught.value.message


def test_each_of_several_keys_is_accepted_under_its_name() -> None:
    gate = access(GATEWAY_API_KEY="old:aaa,new:bbb,ccc")
    names = [client_of(gate, environ(**bearer(key))) for key in ("aaa", "bbb", "ccc")]
    assert names == ["old", "new", "key-3"]


def test_without_keys_everything_is_open() -> None:
    gate = access()
    for path in ("/v1/models", "/admin/models", "/metrics", "/api/v0/models", "/health"):
        assert client_of(gate, environ(path)) == ""
        assert client_of(gate, environ(path, **bearer("whatever"))) == ""


# Roles

ADMIN_PATHS = ["/admin/models", "/admin", "/debug/stream", "/metrics", "/api/v0/models"]


@pytest.mark.parametrize("path", ADMIN_PATHS)
def test_admin_paths_need_an_admin_key_once_one_is_set(path: str) -> None:
    gate = access(GATEWAY_API_KEY="app:user", GATEWAY_ADMIN_KEY="ops:root")
    assert client_of(gate, environ(path, **bearer("root"))) == "ops"
    with pytest.raises(Forbidden) as caught:
        gate.admit(environ(path, **bearer("user")))
    assert caught.value.code == "admin_key_required"
    with pytest.raises(Unauthorized):
        gate.admit(environ(path))


@pytest.mark.parametrize("path", ["/debug", "/debug/"])
def test_loading_the_dashboard_needs_an_allowed_address_but_no_key(path: str) -> None:
    gate = access(GATEWAY_API_KEY="app:user", GATEWAY_ADMIN_KEY="ops:root")
    for method in ("GET", "HEAD"):
        assert client_of(gate, environ(path, REQUEST_METHOD=method)) == ""
    for method in ("POST", "DELETE", "OPTIONS"):
        with pytest.raises(Unauthorized):
            gate.admit(environ(path, REQUEST_METHOD=method))
    with pytest.raises(Forbidden):
        access(IP_ALLOWLIST="10.1.2.3").admit(environ(path))


@pytest.mark.parametrize("path", ["/v1/models", "/chat/completions", "/administration", "/apis"])
def test_other_paths_accept_either_key(path: str) -> None:
    gate = access(GATEWAY_API_KEY="app:user", GATEWAY_ADMIN_KEY="ops:root")
    assert client_of(gate, environ(path, **bearer("user"))) == "app"
    assert client_of(gate, environ(path, **bearer("root"))) == "ops"


@pytest.mark.parametrize("path", ADMIN_PATHS)
def test_without_an_admin_key_any_key_opens_everything(path: str) -> None:
    gate = access(GATEWAY_API_KEY="app:user")
    assert client_of(gate, environ(path, **bearer("user"))) == "app"
    with pytest.raises(Unauthorized):
        gate.admit(environ(path))


def test_an_admin_key_alone_leaves_inference_open() -> None:
    gate = access(GATEWAY_ADMIN_KEY="ops:root")
    assert client_of(gate, environ("/v1/models")) == ""
    assert client_of(gate, environ("/v1/models", **bearer("root"))) == "ops"
    with pytest.raises(Unauthorized):
        gate.admit(environ("/admin/models"))


def test_a_key_with_both_roles_is_an_admin_key() -> None:
    gate = access(GATEWAY_API_KEY="app:same", GATEWAY_ADMIN_KEY="ops:same")
    assert client_of(gate, environ("/admin/models", **bearer("same"))) == "ops"


@pytest.mark.parametrize("path", ["/health", "/health/ready"])
def test_health_needs_a_key_only_if_the_settings_say_so(path: str) -> None:
    assert client_of(access(GATEWAY_API_KEY="user"), environ(path)) == ""
    for keys in ({"GATEWAY_API_KEY": "user"}, {"GATEWAY_ADMIN_KEY": "user"}):
        gate = access(REQUIRE_AUTH_FOR_HEALTH="true", **keys)
        assert client_of(gate, environ(path, **bearer("user"))) == "key-1"
        with pytest.raises(Unauthorized):
            gate.admit(environ(path))


# Addresses


@pytest.mark.parametrize(
    ("allowed", "peer", "admitted"),
    [
        ("*", "203.0.113.9", True),
        ("*", "", True),
        ("192.168.1.5", "192.168.1.5", True),
        ("192.168.1.5", "192.168.1.6", False),
        ("192.168.0.0/16", "192.168.255.1", True),
        ("192.168.0.0/16", "192.169.0.1", False),
        ("192.168.0.0/16", "::ffff:192.168.3.4", True),
        ("192.168.0.0/16", "::ffff:10.0.0.1", False),
        ("::ffff:192.168.1.5", "::ffff:192.168.1.5", True),
        ("2001:db8::/32", "2001:db8:1::2", True),
        ("2001:db8::/32", "2001:db9::1", False),
        ("fe80::/10", "fe80::1%eth0", True),
        ("0.0.0.0/0", "2001:db8::1", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "not-an-address", False),
    ],
)
def test_the_allowlist_decides_by_address(allowed: str, peer: str, admitted: bool) -> None:
    assert is_admitted(access(IP_ALLOWLIST=allowed), environ(peer=peer)) is admitted


def test_the_allowlist_is_checked_before_the_key() -> None:
    gate = access(IP_ALLOWLIST="10.0.0.1", GATEWAY_API_KEY="user")
    with pytest.raises(Forbidden):
        gate.admit(environ(peer="10.0.0.2"))
    with pytest.raises(Unauthorized):
        gate.admit(environ(peer="10.0.0.1"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "admitted"),
    [
        ("10.9.9.9", "192.0.2.1", False),  # forged by a peer that is not a trusted proxy
        ("192.0.2.1", "10.9.9.9", True),  # ignored: the peer itself is allowed
        ("127.0.0.1", "192.0.2.1", True),
        ("127.0.0.1", "10.9.9.9", False),
        ("127.0.0.1", "192.0.2.1, 10.9.9.9", False),  # the client itself sent the left part
        ("127.0.0.1", "10.9.9.9, 192.0.2.1", True),
        ("127.0.0.1", "192.0.2.1, 172.16.0.1, 172.16.0.2", True),  # trusted proxies are skipped
        ("127.0.0.1", "192.0.2.1, unknown", False),
        ("127.0.0.1", "", False),  # the proxy itself is not on the allowlist
        ("127.0.0.1", "172.16.0.1", False),
        ("127.0.0.1", "unix", False),
        ("::ffff:127.0.0.1", "192.0.2.1", True),
        ("127.0.0.1", " 192.0.2.1 ,, ", True),
    ],
)
def test_forwarded_for_is_trusted_only_from_trusted_proxies_and_read_from_the_right(
    peer: str, forwarded: str, admitted: bool
) -> None:
    gate = access(IP_ALLOWLIST="192.0.2.1", TRUSTED_PROXIES="127.0.0.1,172.16.0.0/12")
    assert is_admitted(gate, environ(peer=peer, HTTP_X_FORWARDED_FOR=forwarded)) is admitted


@pytest.mark.parametrize(
    ("allowed", "trusted", "forwarded", "admitted"),
    [
        ("127.0.0.1", "", "", False),
        ("127.0.0.1", "", "127.0.0.1", False),
        ("*", "", "", True),
        ("127.0.0.1", "unix", "", True),
        ("192.0.2.1", "unix", "192.0.2.1", True),
        ("192.0.2.1", "unix", "10.0.0.1", False),
    ],
)
def test_a_unix_peer_is_admitted_if_all_are_or_as_a_trusted_proxy(
    allowed: str, trusted: str, forwarded: str, admitted: bool
) -> None:
    gate = access(IP_ALLOWLIST=allowed, TRUSTED_PROXIES=trusted)
    assert is_admitted(gate, environ(peer="", HTTP_X_FORWARDED_FOR=forwarded)) is admitted


@pytest.mark.parametrize(
    ("address", "settings", "admitted"),
    [
        ("192.0.2.1", {}, True),
        ("192.0.2.1", {"IP_ALLOWLIST": "192.0.2.0/24"}, True),
        ("192.0.2.1", {"IP_ALLOWLIST": "10.0.0.1"}, False),
        ("192.0.2.1", {"IP_ALLOWLIST": "10.0.0.1", "TRUSTED_PROXIES": "192.0.2.1"}, True),
        ("", {"IP_ALLOWLIST": "10.0.0.1"}, False),
        ("", {"IP_ALLOWLIST": "10.0.0.1", "TRUSTED_PROXIES": "unix"}, True),
    ],
)
def test_which_peers_can_be_admitted_at_all(
    address: str, settings: dict[str, str], admitted: bool
) -> None:
    assert access(**settings).may_admit(address) is admitted


# Request ids and CORS


@pytest.mark.parametrize("inbound", ["abc-1", "req:7/8", "a" * 128])
def test_a_valid_request_id_is_kept(inbound: str) -> None:
    request = environ(HTTP_X_REQUEST_ID=inbound)
    access().admit(request)
    assert request[REQUEST_ID] == inbound


@pytest.mark.parametrize("inbound", ["", "a b", "a\nb", "a" * 129, "\xe9", "<script>"])
def test_any_other_request_id_is_replaced_even_if_the_request_is_rejected(inbound: str) -> None:
    gate = access(IP_ALLOWLIST="10.0.0.1")
    minted = []
    for _ in range(2):
        request = environ(HTTP_X_REQUEST_ID=inbound)
        with pytest.raises(Forbidden):
            gate.admit(request)
        minted.append(request[REQUEST_ID])
    assert all(one.startswith("req_") for one in minted)
    assert minted[0] != minted[1]


def preflight(origin: str, **extra: str) -> dict[str, Any]:
    headers = {"HTTP_ACCESS_CONTROL_REQUEST_METHOD": "POST", "HTTP_ORIGIN": origin}
    return environ(**{"REQUEST_METHOD": "OPTIONS", **headers, **extra})


def test_a_preflight_from_an_allowed_origin_needs_no_key() -> None:
    gate = access(GATEWAY_API_KEY="user", CORS_ORIGINS="https://a.example")
    request = preflight("https://a.example", HTTP_ACCESS_CONTROL_REQUEST_HEADERS="x-one, x-two")
    assert gate.admit(request) is True
    headers = dict(gate.cors_headers(request))
    assert headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert headers["Access-Control-Allow-Methods"] == "POST"
    assert headers["Access-Control-Allow-Headers"] == "x-one, x-two"
    assert headers["Vary"] == "Origin"


@pytest.mark.parametrize("origin", ["https://b.example", "https://a.example.evil", "null", ""])
def test_other_origins_get_neither_a_preflight_nor_headers(origin: str) -> None:
    gate = access(GATEWAY_API_KEY="user", CORS_ORIGINS="https://a.example")
    with pytest.raises(Unauthorized):
        gate.admit(preflight(origin))
    assert gate.cors_headers(preflight(origin)) == [("Vary", "Origin")]


def test_the_allowlist_is_checked_before_the_preflight() -> None:
    gate = access(IP_ALLOWLIST="10.0.0.1", CORS_ORIGINS="https://a.example")
    with pytest.raises(Forbidden):
        gate.admit(preflight("https://a.example"))


def test_without_cors_origins_there_are_no_cors_headers() -> None:
    assert access().cors_headers(environ(HTTP_ORIGIN="https://a.example")) == []


def test_a_request_from_an_allowed_origin_still_needs_a_key() -> None:
    gate = access(GATEWAY_API_KEY="user", CORS_ORIGINS="https://a.example")
    with pytest.raises(Unauthorized):
        gate.admit(environ(HTTP_ORIGIN="https://a.example"))
    with pytest.raises(Unauthorized):
        gate.admit(environ(REQUEST_METHOD="OPTIONS", HTTP_ORIGIN="https://a.example"))


@pytest.mark.parametrize(
    ("allowed", "origin", "is_allowed"),
    [
        ("app://obsidian.md", "app://obsidian.md", True),
        ("app://obsidian.md", "app://obsidian.md.evil.example", False),
        ("tauri://localhost,null", "null", True),
        ("tauri://localhost", "null", False),
        ("file://", "file://", True),
        ("vscode-webview://*", "vscode-webview://1j3k5-abc", True),
        ("vscode-webview://*", "vscode-webview://", False),
        ("vscode-webview://*", "https://vscode-webview://a", False),
        ("https://*.example.org", "https://chat.example.org", True),
        ("https://*.example.org", "https://a.b.example.org", True),
        ("https://*.example.org", "https://example.org", False),
        ("https://*.example.org", "http://chat.example.org", False),
        ("https://*.example.org", "https://chat.example.org.evil.example", False),
        ("https://*.example.org", "https://chat.example.org:8443", False),
        ("https://*.example.org", "https://evil.example/.example.org", False),
        ("https://*.example.org", "https://chatXexample.org", False),
        ("https://*.example.org", f"https://{'a' * 9000}.example.org", False),
        ("http://localhost:*", "http://localhost:3000", True),
        ("http://localhost:*", "http://localhost", False),
        ("http://localhost:*", "http://localhost:3000.evil.example", False),
        ("https://A.example:443", "https://a.example", True),
        ("*", "https://anything.example", True),
        ("*", "null", True),
        ("*", "", False),
    ],
)
def test_an_origin_may_be_of_any_scheme_and_a_star_stands_for_a_part(
    allowed: str, origin: str, is_allowed: bool
) -> None:
    gate = access(GATEWAY_API_KEY="user", CORS_ORIGINS=allowed)
    names = dict(gate.cors_headers(environ(HTTP_ORIGIN=origin)))
    assert names.get("Access-Control-Allow-Origin") == (origin if is_allowed else None)
    if is_allowed:
        assert gate.admit(preflight(origin)) is True
    else:
        with pytest.raises(Unauthorized):
            gate.admit(preflight(origin))


# Web pages, where no key is required


def code_of(gate: Access, request: dict[str, Any]) -> str | None:
    """The error code with which a request is rejected, None if it is admitted."""
    try:
        gate.admit(request)
    except GatewayError as error:
        return error.code
    return None


FOREIGN = "https://evil.example"
CROSS_SITE = {"HTTP_SEC_FETCH_SITE": "cross-site"}
NAVIGATES = {**CROSS_SITE, "HTTP_SEC_FETCH_MODE": "navigate"}


@pytest.mark.parametrize(
    ("host", "origin", "scheme", "own"),
    [
        ("localhost:8002", "http://localhost:8002", "http", True),
        ("LOCALHOST:8002", "http://localhost:8002", "http", True),
        ("[::1]:8002", "http://[::1]:8002", "http", True),
        ("localhost", "http://localhost", "http", True),
        ("localhost:80", "http://localhost", "http", True),
        ("localhost", "http://localhost:80", "http", True),
        ("localhost", "https://localhost", "http", False),
        ("localhost", "https://localhost", "https", True),
        ("localhost", "http://localhost", "https", False),
        ("localhost:8002", "http://localhost", "http", False),
        ("localhost:8002", "http://localhost:8003", "http", False),
        ("localhost:8002", "http://127.0.0.1:8002", "http", False),
        ("localhost:8002", "http://localhost:8002.evil.example", "http", False),
        ("localhost:8002", "http://localhost:8002@evil.example", "http", False),
        ("localhost:8002", "http://localhost:8002/", "http", False),
        ("localhost:8002", "app://localhost:8002", "http", False),
        ("localhost:8002", "localhost:8002", "http", False),
        ("localhost:8002", "null", "http", False),
        ("localhost:8002", "", "http", False),
        ("", "http://", "http", False),
        ("", "null", "http", False),
    ],
)
def test_without_keys_only_the_gateways_own_origin_is_admitted(
    host: str, origin: str, scheme: str, own: bool
) -> None:
    request = environ("/admin/models", HTTP_HOST=host, HTTP_ORIGIN=origin)
    request["wsgi.url_scheme"] = scheme
    assert code_of(access(), request) == (None if own else "origin_not_allowed")


def test_the_scheme_of_a_trusted_proxy_decides_the_default_port() -> None:
    gate = access(TRUSTED_PROXIES="10.0.0.1")
    request = {
        "HTTP_HOST": "gw.example",
        "HTTP_ORIGIN": "https://gw.example",
        "HTTP_X_FORWARDED_PROTO": "https",
    }
    assert code_of(gate, environ(peer="10.0.0.1", **request)) is None
    assert code_of(gate, environ(peer="10.0.0.2", **request)) == "origin_not_allowed"


@pytest.mark.parametrize("path", ["/v1/models", "/admin/models", "/debug/", "/metrics", "/nowhere"])
def test_without_keys_an_allowed_origin_is_admitted_and_others_are_not(path: str) -> None:
    gate = access(CORS_ORIGINS="https://a.example,null")
    for origin in ("https://a.example", "null"):
        assert code_of(gate, environ(path, HTTP_ORIGIN=origin, **CROSS_SITE)) is None
        assert gate.admit(preflight(origin, PATH_INFO=path)) is True
    for request in (environ(path, HTTP_ORIGIN=FOREIGN), preflight(FOREIGN, PATH_INFO=path)):
        assert code_of(gate, request) == "origin_not_allowed"
        assert dict(gate.cors_headers(request)) == {"Vary": "Origin"}


@pytest.mark.parametrize(
    ("method", "headers", "admitted"),
    [
        ("GET", CROSS_SITE, False),
        ("GET", {**CROSS_SITE, "HTTP_SEC_FETCH_MODE": "no-cors"}, False),
        ("GET", NAVIGATES, True),
        ("HEAD", NAVIGATES, True),
        ("POST", NAVIGATES, False),
        ("GET", {**NAVIGATES, "HTTP_ORIGIN": FOREIGN}, False),
        ("GET", {"HTTP_SEC_FETCH_SITE": "same-origin"}, True),
        ("GET", {"HTTP_SEC_FETCH_SITE": "same-site"}, True),
        ("POST", {"HTTP_SEC_FETCH_SITE": "same-site", "HTTP_ORIGIN": "http://localhost:1"}, False),
        ("GET", {"HTTP_SEC_FETCH_SITE": "none"}, True),
        ("POST", {}, True),
    ],
)
def test_without_keys_a_cross_site_request_is_admitted_only_if_it_navigates(
    method: str, headers: dict[str, str], admitted: bool
) -> None:
    request = environ(REQUEST_METHOD=method, HTTP_HOST="localhost:8002", **headers)
    assert code_of(access(), request) == (None if admitted else "origin_not_allowed")


@pytest.mark.parametrize(
    ("host", "admitted"),
    [
        ("localhost", True),
        ("localhost:8002", True),
        ("Localhost.:8002", True),
        ("gateway.localhost", True),
        ("127.0.0.1:8002", True),
        ("127.9.9.9", True),
        ("[::1]:8002", True),
        ("[::ffff:127.0.0.1]", True),
        ("", True),  # no browser omits it
        ("evil.example", False),
        ("evil.example:8002", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("evil-localhost", False),
        ("0.0.0.0:8002", False),
        ("192.168.1.2:8002", False),
        ("[::2]", False),
        ("localhost:8002:1", False),
        ("localhost@evil.example", False),
        ("a" * 9000, False),
    ],
)
def test_a_keyless_gateway_on_loopback_answers_only_by_a_loopback_name(
    host: str, admitted: bool
) -> None:
    expected = None if admitted else "host_not_allowed"
    assert code_of(access(), environ(HTTP_HOST=host)) == expected
    assert code_of(access(GATEWAY_ADMIN_KEY="root"), environ(HTTP_HOST=host)) == expected
    own = f"http://{host}"  # a page at this name, after DNS rebinding
    if not admitted:
        request = environ("/admin/models", HTTP_HOST=host, HTTP_ORIGIN=own)
        assert code_of(access(), request) in ("host_not_allowed", "origin_not_allowed")


@pytest.mark.parametrize(
    "settings",
    [
        {"GATEWAY_API_KEY": "user"},
        {"TRUSTED_PROXIES": "127.0.0.1"},
        {"GATEWAY_HOST": "0.0.0.0", "ALLOW_UNAUTHENTICATED": "true"},
        {"GATEWAY_HOST": "unix:/run/gateway.sock"},
    ],
)
def test_any_other_gateway_answers_by_any_name(settings: dict[str, str]) -> None:
    for path in ("/health", "/debug/"):
        assert code_of(access(**settings), environ(path, HTTP_HOST="gw.example")) is None
    request = environ(HTTP_HOST="gw.example", **bearer("user"))
    assert code_of(access(**settings), request) is None


def test_where_a_key_is_required_it_decides_and_not_the_origin() -> None:
    gate = access(GATEWAY_API_KEY="user", GATEWAY_ADMIN_KEY="root")
    for path in ("/v1/models", "/admin/models", "/metrics", "/openapi.json"):
        foreign = {"HTTP_ORIGIN": FOREIGN, "HTTP_HOST": "evil.example", **CROSS_SITE}
        assert code_of(gate, environ(path, **foreign)) == "invalid_api_key"
        assert code_of(gate, environ(path, **foreign, **bearer("root"))) is None


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/debug", "/debug/"])
def test_public_paths_of_a_gateway_with_keys_reject_foreign_pages(path: str) -> None:
    gate = access(GATEWAY_API_KEY="user")
    assert code_of(gate, environ(path, HTTP_ORIGIN=FOREIGN)) == "origin_not_allowed"
    assert code_of(gate, environ(path, **CROSS_SITE)) == "origin_not_allowed"
    assert code_of(gate, environ(path, **NAVIGATES)) is None


def test_an_admin_key_alone_protects_only_admin_paths_from_foreign_pages() -> None:
    gate = access(GATEWAY_ADMIN_KEY="root")
    assert code_of(gate, environ("/v1/models", HTTP_ORIGIN=FOREIGN)) == "origin_not_allowed"
    assert code_of(gate, environ("/admin/models", HTTP_ORIGIN=FOREIGN)) == "invalid_api_key"


def test_the_allowlist_is_checked_before_the_origin_and_the_origin_before_the_body() -> None:
    gate = access(IP_ALLOWLIST="10.0.0.1")
    foreign = {"HTTP_ORIGIN": FOREIGN, "CONTENT_LENGTH": "2"}
    assert code_of(gate, environ("/admin/models", **foreign)) == "ip_not_allowed"
    assert code_of(gate, environ("/admin/models", "10.0.0.1", **foreign)) == "origin_not_allowed"


@pytest.mark.parametrize(
    ("headers", "accepted"),
    [
        ({"CONTENT_LENGTH": "2", "CONTENT_TYPE": "application/json"}, True),
        ({"CONTENT_LENGTH": "2", "CONTENT_TYPE": "Application/JSON; charset=utf-8"}, True),
        ({"CONTENT_LENGTH": "2", "CONTENT_TYPE": "text/plain"}, False),
        ({"CONTENT_LENGTH": "2", "CONTENT_TYPE": "text/plain; application/json"}, False),
        ({"CONTENT_LENGTH": "2", "CONTENT_TYPE": "application/jsonp"}, False),
        ({"CONTENT_LENGTH": "2"}, False),
        ({"HTTP_TRANSFER_ENCODING": "chunked"}, False),
        ({"CONTENT_LENGTH": "0", "CONTENT_TYPE": "text/plain"}, True),
        ({}, True),
    ],
)
def test_without_keys_an_admin_body_must_be_declared_as_json(
    headers: dict[str, str], accepted: bool
) -> None:
    request = environ("/admin/models/activate", REQUEST_METHOD="POST", **headers)
    assert code_of(access(), request) == (None if accepted else UnsupportedMediaType.code)
    with_key = environ("/admin/models/activate", REQUEST_METHOD="POST", **headers, **bearer("k"))
    assert code_of(access(GATEWAY_API_KEY="k"), with_key) is None
    inference = environ("/v1/audio/transcriptions", REQUEST_METHOD="POST", **headers)
    assert code_of(access(), inference) is None
