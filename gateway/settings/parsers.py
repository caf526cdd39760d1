"""Parsers that convert the text of a variable to its value.

Each raises ValueError with a message that is shown after the name of the variable and contains no
secret.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_KEY_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_API_TOKEN = re.compile(r"sk-lm-[A-Za-z0-9]{8}:[A-Za-z0-9]{20}")


@dataclass(frozen=True)
class Key:
    """A valid key and the name under which its requests are recorded."""

    name: str
    secret: str


@dataclass(frozen=True)
class AddressSet:
    """A set of networks, and optionally everybody (``*``) or peers on a Unix socket (``unix``)."""

    networks: tuple[Network, ...] = ()
    everybody: bool = False
    unix: bool = False


def base_url(text: str) -> str:
    """``http://host:port[/v1][/]`` → ``http://host:port``."""
    parts = _split(text)
    if parts.scheme not in ("http", "https"):
        raise ValueError("must start with http:// or https://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not contain user:password@; use LMSTUDIO_API_TOKEN")
    if not parts.hostname:
        raise ValueError("has no host name")
    try:
        port = parts.port
    except ValueError:
        raise ValueError("has a bad port") from None
    if port == 0:
        raise ValueError("has a bad port")
    if parts.query or parts.fragment or parts.path.rstrip("/") not in ("", "/v1"):
        raise ValueError("must be the root of the server, without a path or query")
    if re.search(r"[\s\x00-\x1f]", text):
        raise ValueError("contains whitespace or control characters")
    return f"{parts.scheme}://{parts.netloc}"


def api_token(text: str) -> str:
    if text and not _API_TOKEN.fullmatch(text):
        raise ValueError("is not an LM Studio API token")
    return text


def host(text: str) -> str:
    if text.startswith("unix:"):
        if len(text) == len("unix:"):
            raise ValueError("is missing the path of the socket")
        return text
    if not text or re.search(r"[\s/]", text):
        raise ValueError("is not a host name or address")
    return text.strip("[]")


def integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return parse


def milliseconds(text: str) -> float:
    return integer(0, 86_400_000)(text) / 1000


def timeout(text: str) -> float | None:
    """Milliseconds to seconds; 0 means no limit."""
    return milliseconds(text) or None


def boolean(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("true", "1", "yes", "on"):
        return True
    if lowered in ("false", "0", "no", "off"):
        return False
    raise ValueError("must be true or false")


def choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return text.lower()

    return parse


def parse_keys(text: str) -> tuple[Key, ...]:
    """Comma-separated ``key`` or ``name:key``; a key without a name is called ``key-POSITION``."""
    keys = []
    for position, item in enumerate(_items(text), start=1):
        name, colon, secret = item.partition(":")
        if not colon:
            name, secret = f"key-{position}", item
        if not _KEY_NAME.fullmatch(name):
            raise ValueError(f"item {position}: a name has 1-64 letters, digits, '.', '_' or '-'")
        if not re.fullmatch(r"[\x21-\x7e]+", secret):
            raise ValueError(f"item {position}: a key may contain only visible ASCII characters")
        keys.append(Key(name, secret))
    return tuple(keys)


def addresses(*words: str) -> Callable[[str], AddressSet]:
    def parse(text: str) -> AddressSet:
        networks = []
        found = set()
        for item in _items(text):
            if item in words:
                found.add(item)
                continue
            try:
                networks.append(ipaddress.ip_network(item, strict=False))
            except ValueError:
                raise ValueError(f"{item!r} is not an IP address or CIDR") from None
        return AddressSet(tuple(networks), everybody="*" in found, unix="unix" in found)

    return parse


def origins(text: str) -> frozenset[str]:
    origins = _items(text)
    for origin in origins:
        parts = _split(origin)
        exact = origin == f"{parts.scheme}://{parts.netloc}" and "@" not in origin
        if parts.scheme not in ("http", "https") or not parts.hostname or not exact:
            raise ValueError(f"{origin!r} is not an origin (scheme://host[:port] without a path)")
    return frozenset(origins)


def state_url(text: str) -> str:
    if not text:
        return ""
    parts = _split(text)
    if parts.scheme == "sqlite":
        if not text.startswith("sqlite:///") or text == "sqlite:///":
            raise ValueError("must be sqlite:/// followed by a file path")
        return text
    if parts.scheme in ("redis", "rediss", "unix"):
        return text
    raise ValueError("must start with sqlite:/// or redis://")


def _split(text: str) -> SplitResult:
    try:
        return urlsplit(text)
    except ValueError:
        # the original message contains the URL, which may contain a password
        raise ValueError("is not a URL") from None


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]
