"""Access: who is admitted, checked on handmade WSGI environs."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.errors import Forbidden, Unauthorized
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
