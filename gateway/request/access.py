"""Who gets in: request id, allowlist, preflight, key and role, in that order (contract §2).

Everything here works on the WSGI environ, so that one code serves every route.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gateway.errors import Forbidden, Headers, Unauthorized
from gateway.settings import AddressSet, Key, Settings

Environ = dict[str, Any]

#: Where the request id is kept in the environ.
REQUEST_ID = "gateway.request_id"
#: Where the name of the key is kept in the environ.
CLIENT = "gateway.client"

#: What stands for the address of a peer on a Unix socket, which has none.
UNIX = "unix"

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_ADMIN_PREFIXES = ("/admin/", "/debug/", "/metrics/", "/api/")
_ADMIN_PATHS = ("/admin", "/debug", "/metrics", "/api")
#: The dashboard, which a browser must get before it can ask for the key.
DASHBOARD_PATHS = ("/debug", "/debug/")
#: Where a key is needed only with ``REQUIRE_AUTH_FOR_HEALTH``.
HEALTH_PATHS = ("/health", "/health/", "/health/ready")
#: What is no inference, so that admin keys alone close it too; any key opens it.
_ANY_KEY_PATHS = (*HEALTH_PATHS, "/openapi.json", "/openapi.json/")


@dataclass(frozen=True)
class _Digest:
    name: str
    admin: bool
    digest: bytes


class Access:
    """The gate of one gateway. :meth:`admit` raises when a request must not go on."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._digests = [
            *_digests(settings.gateway_admin_key, admin=True),
            *_digests(settings.gateway_api_key, admin=False),
        ]
        self._roles = bool(settings.gateway_admin_key)
        self._open = not settings.gateway_api_key

    def admit(self, environ: Environ) -> bool:
        """Let the request pass or raise Forbidden (403) or Unauthorized (401).

        Leaves the request id and the client's key name in the environ. Returns whether the request
        is a CORS preflight, which is answered without a key and goes no further.
        """
        name_request(environ)
        if not self._settings.ip_allowlist.everybody:
            self._check_address(environ)
        if self.is_preflight(environ):
            return True
        environ[CLIENT] = self._check_key(environ)
        return False

    def is_preflight(self, environ: Environ) -> bool:
        """Whether this is a CORS preflight of an allowed origin."""
        return (
            environ["REQUEST_METHOD"] == "OPTIONS"
            and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
            and environ.get("HTTP_ORIGIN") in self._settings.cors_origins
        )

    def cors_headers(self, environ: Environ) -> Headers:
        """The CORS headers of any answer; empty unless the origin is one of the settings'."""
        if not self._settings.cors_origins:
            return []
        origin = environ.get("HTTP_ORIGIN")
        if origin not in self._settings.cors_origins:
            return [("Vary", "Origin")]
        headers = [
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", "X-Request-Id, Retry-After"),
            ("Vary", "Origin"),
        ]
        if self.is_preflight(environ):
            asked = environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "")
            headers += [
                ("Access-Control-Allow-Methods", environ["HTTP_ACCESS_CONTROL_REQUEST_METHOD"]),
                ("Access-Control-Allow-Headers", asked or "Authorization, Content-Type, X-API-Key"),
                ("Access-Control-Max-Age", "600"),
            ]
        return headers

    def peer(self, environ: Environ) -> str:
        """The address that the request comes from, as far as trusted proxies tell it."""
        nearest = _socket_peer(environ)
        trusted = self._settings.trusted_proxies
        if not self.trusts_peer(environ):
            return nearest
        hops = [hop.strip() for hop in environ.get("HTTP_X_FORWARDED_FOR", "").split(",")]
        for hop in reversed([hop for hop in hops if hop]):
            nearest = hop
            if not _within(hop, trusted):
                break
        return nearest

    def trusts_peer(self, environ: Environ) -> bool:
        """Whether the peer's own ``X-Forwarded-*`` headers are to be believed."""
        trusted = self._settings.trusted_proxies
        nearest = _socket_peer(environ)
        return trusted.unix if nearest == UNIX else _within(nearest, trusted)

    def _check_address(self, environ: Environ) -> None:
        peer = self.peer(environ)
        if peer == UNIX and self.trusts_peer(environ) and _socket_peer(environ) == UNIX:
            return
        if not _within(peer, self._settings.ip_allowlist):
            raise Forbidden("Your address is not on the allowlist.", code="ip_not_allowed")

    def _check_key(self, environ: Environ) -> str:
        path = environ["PATH_INFO"]
        if path in HEALTH_PATHS and not self._settings.require_auth_for_health:
            return ""
        if path in DASHBOARD_PATHS and environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return ""
        needs_admin = self._roles and is_admin_path(path)
        if self._open and not needs_admin and not (self._roles and path in _ANY_KEY_PATHS):
            key = self._find(environ) if self._digests else None
            return key.name if key else ""
        key = self._find(environ)
        if key is None:
            raise Unauthorized("Missing or incorrect API key.")
        if needs_admin and not key.admin:
            raise Forbidden("This path needs an admin key.", code="admin_key_required")
        return key.name

    def _find(self, environ: Environ) -> _Digest | None:
        """The accepted key that the request carries, if any."""
        for presented in _presented(environ):
            found = self._match(presented)
            if found is not None:
                return found
        return None

    def _match(self, presented: str) -> _Digest | None:
        # The digest of an unknown key is compared with all accepted ones, each in constant time,
        # so that neither the answer's time nor the order of the keys tells anything.
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        found = None
        for accepted in self._digests:
            if hmac.compare_digest(accepted.digest, digest) and found is None:
                found = accepted
        return found


def name_request(environ: Environ) -> str:
    """Keep a sane inbound ``X-Request-Id``, else mint one; leave it in the environ."""
    inbound = environ.get("HTTP_X_REQUEST_ID", "")
    if not inbound or not _SANE_REQUEST_ID.fullmatch(inbound):
        inbound = "req_" + secrets.token_hex(12)
    environ[REQUEST_ID] = inbound
    return str(inbound)


def _digests(keys: Iterable[Key], *, admin: bool) -> list[_Digest]:
    return [_Digest(key.name, admin, hashlib.sha256(key.secret.encode()).digest()) for key in keys]


def _presented(environ: Environ) -> Iterable[str]:
    scheme, _, credentials = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        yield credentials.strip()
    if environ.get("HTTP_X_API_KEY"):
        yield environ["HTTP_X_API_KEY"].strip()


def is_admin_path(path: str) -> bool:
    """Whether a path needs an admin key where there are such."""
    # werkzeug's routing overlooks repeated slashes at the beginning
    path = "/" + path.lstrip("/")
    return path in _ADMIN_PATHS or path.startswith(_ADMIN_PREFIXES)


@lru_cache(maxsize=4096)
def _within(address: str, allowed: AddressSet) -> bool:
    """Whether an address is in a set; an IPv4-mapped IPv6 address counts as its IPv4 form."""
    if allowed.everybody:
        return True
    try:
        ip = ipaddress.ip_address(address.partition("%")[0].strip("[]"))
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    candidates = [ip] if mapped is None else [ip, mapped]
    return any(
        candidate in network
        for network in allowed.networks
        for candidate in candidates
        if candidate.version == network.version
    )


def _socket_peer(environ: Environ) -> str:
    return str(environ.get("REMOTE_ADDR") or UNIX)
