"""Which web pages may use the gateway, judged by ``Origin``, ``Sec-Fetch-Site`` and ``Host``.

A browser sends the requests of any web page to any address that its user can reach, also to
loopback. Where no key is required, these headers, which a page can't forge, are all that tells such
a request from one that the user intends (contract §2).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Any

Environ = dict[str, Any]

#: Longer than any origin of a browser; bounds the time that matching takes.
MAX_ORIGIN = 512
_DEFAULT_PORTS = {"http": 80, "https": 443}
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/@\s]+)(?::([0-9]{0,5}))?")


class AllowedOrigins:
    """The origins of ``CORS_ORIGINS``; false if there are none."""

    def __init__(self, origins: Iterable[str]) -> None:
        origins = frozenset(origins)
        self._everybody = "*" in origins
        self._exact = frozenset(one for one in origins if "*" not in one)
        patterns = "|".join(_expression(one) for one in origins - self._exact - {"*"})
        self._pattern = re.compile(patterns) if patterns else None

    def __bool__(self) -> bool:
        return bool(self._everybody or self._exact or self._pattern)

    def __contains__(self, origin: object) -> bool:
        if not isinstance(origin, str) or not origin or len(origin) > MAX_ORIGIN:
            return False
        if self._everybody or origin in self._exact:
            return True
        return self._pattern is not None and self._pattern.fullmatch(origin) is not None


def is_own(origin: str, host: str, scheme: str) -> bool:
    """Whether ``origin`` has the host and port of a ``Host`` header.

    ``scheme`` is that of the request, whose default port counts if ``Host`` names none.
    """
    origin_scheme, _, authority = origin.partition("://")
    if origin_scheme not in _DEFAULT_PORTS:
        return False
    own = _address(host, scheme)
    return own is not None and own == _address(authority, origin_scheme)


def is_loopback_host(host: str) -> bool:
    """Whether a ``Host`` header names this machine by a loopback name or address.

    Another name may be one that a web page's owner lets point to 127.0.0.1 (DNS rebinding).
    """
    address = _address(host, "http")
    if address is None:
        return False
    name = address[0].removesuffix(".")
    if name == "127.0.0.1" or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ip = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def is_cross_site(environ: Environ) -> bool:
    """Whether the browser says that a page of another site sent this request, other than by a link
    or an address that its user followed."""
    if environ.get("HTTP_SEC_FETCH_SITE", "").strip().lower() != "cross-site":
        return False
    navigates = environ.get("HTTP_SEC_FETCH_MODE", "").strip().lower() == "navigate"
    return not (navigates and environ["REQUEST_METHOD"] in ("GET", "HEAD"))


def _address(authority: str, scheme: str) -> tuple[str, int] | None:
    """Host in lower case and port of ``host[:port]``; None if it is malformed."""
    if len(authority) > MAX_ORIGIN:
        return None
    found = _AUTHORITY.fullmatch(authority)
    if found is None:
        return None
    return found[1].lower(), int(found[2] or _DEFAULT_PORTS.get(scheme, 80))


def _expression(pattern: str) -> str:
    """The regular expression of an origin with ``*`` in its host, as its port, or both."""
    host, port, _ = pattern.partition(":*") if pattern.endswith(":*") else (pattern, "", "")
    return re.escape(host).replace(r"\*", "[^/]+") + (":[0-9]+" if port else "")
