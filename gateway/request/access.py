"""Who is admitted: request id, allowlist, preflight, key and role, in that order.

Where no key is required, the request must not be one that a web page of another origin sends.
Everything here works on the WSGI environ, so that the same code guards every route. Paths are
compared in the form that :func:`.target.normalize` gives them.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from typing import Any

from gateway.errors import Forbidden, Headers, Unauthorized, UnsupportedMediaType
from gateway.request.origins import AllowedOrigins, is_cross_site, is_loopback_host, is_own
from gateway.request.target import normalize
from gateway.settings import AddressSet, Key, Settings, is_loopback

Environ = dict[str, Any]

#: The key of the request id in the environ.
REQUEST_ID = "gateway.request_id"
#: The environ key of the client: the name of its API key, empty without one.
CLIENT = "gateway.client"

#: Stands in for the address of a peer on a Unix socket, which has none.
UNIX = "unix"

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
#: The request headers that a preflight may ask for if it does not name any itself.
_CORS_HEADERS = "Authorization, Content-Type, X-API-Key"
_ADMIN_PREFIXES = ("/admin/", "/debug/", "/metrics/", "/api/")
_ADMIN_PATHS = ("/admin", "/debug", "/metrics", "/api")
#: The dashboard, which a browser must load before it can ask for the key.
DASHBOARD_PATHS = ("/debug", "/debug/")
#: Paths that need a key only with ``REQUIRE_AUTH_FOR_HEALTH``.
HEALTH_PATHS = ("/health", "/health/ready")
#: Paths other than inference that any key opens. They need a key even if only admin keys are set.
_ANY_KEY_PATHS = (*HEALTH_PATHS, "/openapi.json")
_FOREIGN_ORIGIN = (
    "No key is required here, so requests from web pages of other origins are rejected."
    " Add the origin to CORS_ORIGINS, or set GATEWAY_API_KEY."
)
_FOREIGN_HOST = (
    "No key is required here, so the Host header must name this machine, such as localhost or"
    " 127.0.0.1. Set GATEWAY_API_KEY, or TRUSTED_PROXIES if a proxy sent this request."
)


class _Role(Enum):
    """The key that a request needs."""

    #: None, whatever the settings; a key is not looked at.
    PUBLIC = auto()
    #: None with these settings; the name of a key is recorded all the same.
    NONE = auto()
    ANY = auto()
    ADMIN = auto()


@dataclass(frozen=True)
class _Digest:
    """An accepted key, of which only the SHA-256 digest is kept."""

    name: str
    admin: bool
    digest: bytes


class Access:
    """Checks every request of one gateway. :meth:`admit` raises if a request is rejected."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._digests = [
            *_digests(settings.gateway_admin_key, admin=True),
            *_digests(settings.gateway_api_key, admin=False),
        ]
        self._roles = bool(settings.gateway_admin_key)
        self._open = not settings.gateway_api_key
        self._origins = AllowedOrigins(settings.cors_origins)
        host = settings.gateway_host
        # A gateway whose inference needs a key answers its public paths under any name: they
        # reveal nothing, and a proxy that is not trusted may ask for /health.
        self._checks_host = self._open and is_loopback(host) and not host.startswith("unix:")

    def admit(self, environ: Environ) -> bool:
        """Admit the request, or raise Forbidden (403), Unauthorized (401) or, for an admin body
        that is not JSON where no key is required, UnsupportedMediaType (415).

        Puts the request id and the name of the client's key into the environ. Returns whether the
        request is a CORS preflight, which needs no key and no further handling.
        """
        request_id_of(environ)
        if not self._settings.ip_allowlist.everybody:
            self._check_address(environ)
        role = self._required(environ)
        needs_no_key = role is _Role.PUBLIC or role is _Role.NONE
        if needs_no_key:
            self._check_page(environ)
        if self.is_preflight(environ):
            return True
        environ[CLIENT] = self._check_key(environ, role)
        if needs_no_key:
            _check_admin_body(environ)
        return False

    def may_admit(self, address: str) -> bool:
        """Whether any request of a connection from this address can pass the allowlist.

        A trusted proxy's can, as it vouches for others. An empty address is a peer on a Unix
        socket.
        """
        connection = {"REMOTE_ADDR": address}
        return self.trusts_peer(connection) or _within(
            _socket_peer(connection), self._settings.ip_allowlist
        )

    def is_preflight(self, environ: Environ) -> bool:
        """Whether this is a CORS preflight from an allowed origin."""
        return (
            environ["REQUEST_METHOD"] == "OPTIONS"
            and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
            and environ.get("HTTP_ORIGIN") in self._origins
        )

    def cors_headers(self, environ: Environ) -> Headers:
        """The CORS headers of any response; empty if ``CORS_ORIGINS`` is."""
        if not self._origins:
            return []
        origin = environ.get("HTTP_ORIGIN")
        if origin is None or origin not in self._origins:
            return [("Vary", "Origin")]
        headers = [
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", "X-Request-Id, Retry-After"),
            ("Vary", "Origin"),
        ]
        if self.is_preflight(environ):
            requested = environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "")
            headers += [
                ("Access-Control-Allow-Methods", environ["HTTP_ACCESS_CONTROL_REQUEST_METHOD"]),
                ("Access-Control-Allow-Headers", requested or _CORS_HEADERS),
                ("Access-Control-Max-Age", "600"),
            ]
        return headers

    def peer(self, environ: Environ) -> str:
        """The client's address, which trusted proxies report in ``X-Forwarded-For``."""
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
        """Whether the socket's peer is a proxy whose ``X-Forwarded-*`` headers can be trusted."""
        trusted = self._settings.trusted_proxies
        nearest = _socket_peer(environ)
        return trusted.unix if nearest == UNIX else _within(nearest, trusted)

    def _check_address(self, environ: Environ) -> None:
        peer = self.peer(environ)
        if peer == UNIX and self.trusts_peer(environ) and _socket_peer(environ) == UNIX:
            return
        if not _within(peer, self._settings.ip_allowlist):
            raise Forbidden("Your address is not on the allowlist.", code="ip_not_allowed")

    def _check_page(self, environ: Environ) -> None:
        """Reject what a web page of another origin sends where no key is required."""
        host = environ.get("HTTP_HOST", "")
        origin = environ.get("HTTP_ORIGIN")
        if origin is not None:
            if origin not in self._origins and not is_own(origin, host, self._scheme(environ)):
                raise Forbidden(_FOREIGN_ORIGIN, code="origin_not_allowed")
        elif is_cross_site(environ):
            raise Forbidden(_FOREIGN_ORIGIN, code="origin_not_allowed")
        # every browser sends a Host
        foreign = self._checks_host and host and not is_loopback_host(host)
        if foreign and not self.trusts_peer(environ):
            raise Forbidden(_FOREIGN_HOST, code="host_not_allowed")

    def _scheme(self, environ: Environ) -> str:
        """The scheme of the URL that the client requested, as a trusted proxy reports it."""
        forwarded = environ.get("HTTP_X_FORWARDED_PROTO")
        if forwarded and self.trusts_peer(environ):
            return str(forwarded).partition(",")[0].strip().lower()
        return str(environ.get("wsgi.url_scheme", "http"))

    def _required(self, environ: Environ) -> _Role:
        """The key that the request needs."""
        path = environ["PATH_INFO"]
        if path in HEALTH_PATHS and not self._settings.require_auth_for_health:
            return _Role.PUBLIC
        if path in DASHBOARD_PATHS and environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return _Role.PUBLIC
        if self._roles and is_admin_path(path):
            return _Role.ADMIN
        if self._open and not (self._roles and path in _ANY_KEY_PATHS):
            return _Role.NONE
        return _Role.ANY

    def _check_key(self, environ: Environ, role: _Role) -> str:
        """The name of the request's key; empty if there is none and none is required."""
        if role is _Role.PUBLIC:
            return ""
        key = self._find(environ) if self._digests else None
        if role is _Role.NONE:
            return key.name if key else ""
        if key is None:
            raise Unauthorized("Missing or incorrect API key.")
        if role is _Role.ADMIN and not key.admin:
            raise Forbidden("This path needs an admin key.", code="admin_key_required")
        return key.name

    def _find(self, environ: Environ) -> _Digest | None:
        """The accepted key that the request presents, None if there is none."""
        for presented in _presented(environ):
            found = self._match(presented)
            if found is not None:
                return found
        return None

    def _match(self, presented: str) -> _Digest | None:
        # The presented key is compared with every accepted one, each in constant time, so that the
        # time of the response reveals neither a digest nor the position of a key.
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        found = None
        for accepted in self._digests:
            if hmac.compare_digest(accepted.digest, digest) and found is None:
                found = accepted
        return found


def request_id_of(environ: Environ) -> str:
    """The request's id: the inbound ``X-Request-Id`` if it is valid, else a new one.

    The first call puts it into the environ, where later calls find it.
    """
    request_id = environ.get(REQUEST_ID)
    if request_id is None:
        request_id = environ.get("HTTP_X_REQUEST_ID", "")
        if not _SANE_REQUEST_ID.fullmatch(request_id):
            request_id = "req_" + secrets.token_hex(12)
        environ[REQUEST_ID] = request_id
    return str(request_id)


def _digests(keys: Iterable[Key], *, admin: bool) -> list[_Digest]:
    return [_Digest(key.name, admin, hashlib.sha256(key.secret.encode()).digest()) for key in keys]


def _presented(environ: Environ) -> Iterable[str]:
    """The keys that a request presents, in the order in which they are tried."""
    scheme, _, credentials = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        yield credentials.strip()
    if environ.get("HTTP_X_API_KEY"):
        yield environ["HTTP_X_API_KEY"].strip()


def _check_admin_body(environ: Environ) -> None:
    """Reject a body of ``/admin`` that is not declared as JSON.

    A form of any web page can send the other types without a preflight.
    """
    path = "/" + environ["PATH_INFO"].lstrip("/")
    if path != "/admin" and not path.startswith("/admin/"):
        return
    has_body = environ.get("CONTENT_LENGTH", "") not in ("", "0")
    if not has_body and "HTTP_TRANSFER_ENCODING" not in environ:
        return
    media_type = environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType("The body must be application/json; set Content-Type.")


def is_admin_path(path: str) -> bool:
    """Whether a path needs an admin key, once admin keys are set."""
    # werkzeug's routing ignores repeated leading slashes; normalizing again costs little
    path = normalize("/" + path.lstrip("/"))
    return path in _ADMIN_PATHS or path.startswith(_ADMIN_PREFIXES)


def _within(address: str, allowed: AddressSet) -> bool:
    """Whether an address is in a set; an IPv4-mapped IPv6 address counts as its IPv4 form."""
    # the address may come from a header, of any length; one with a zone has less than 64 characters
    return allowed.everybody or (len(address) <= 64 and _is_listed(address, allowed))


@lru_cache(maxsize=4096)
def _is_listed(address: str, allowed: AddressSet) -> bool:
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
