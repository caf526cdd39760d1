"""Parsers that convert the text of a variable to its value.

Each raises ValueError with a message that is shown after the name of the variable and contains no
secret.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qsl, urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_KEY_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
#: What follows ``://`` in an origin.
_AUTHORITY = re.compile(r"(?:(?![/?#\\])[\x21-\x7e])*")
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
    _check_port(parts)
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
    """Origins as browsers send them, with ``*`` for a part that changes (``vscode-webview://*``);
    ``*`` alone stands for all."""
    return frozenset(_origin(item) for item in _items(text))


def is_any_site(origin: str) -> bool:
    """Whether an item of ``CORS_ORIGINS`` lets in web pages from every host."""
    return origin == "*" or re.fullmatch(r"https?://\*(:.*)?", origin) is not None


def _origin(text: str) -> str:
    """An item of ``CORS_ORIGINS``, in the form in which browsers write it."""
    if text in ("*", "null"):
        return text
    if "@" in text:
        raise ValueError("an origin has no user:password@")
    scheme, _, authority = text.partition("://")
    scheme = scheme.lower()
    valid = re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) and _AUTHORITY.fullmatch(authority)
    if not valid or not (authority or scheme == "file"):
        raise ValueError(f"{text!r} is not an origin (scheme://host[:port] without a path)")
    if scheme in ("http", "https"):
        return f"{scheme}://{_web_host(text, scheme, authority.lower())}"
    if authority.count("*") > 1:
        raise ValueError(f"{text!r} is not an origin: it has more than one *")
    return f"{scheme}://{authority}"


def _web_host(text: str, scheme: str, authority: str) -> str:
    """``host[:port]`` of an http or https origin, without the default port."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^\[\]:]+)(?::([0-9]{1,5}|\*))?", authority)
    port = found and found[2]
    if found is None or (port and port != "*" and int(port) > 65535):
        raise ValueError(f"{text!r} is not an origin (scheme://host[:port] without a path)")
    name = found[1]
    if name.count("*") > 1:
        raise ValueError(f"{text!r} is not an origin: its host has more than one *")
    if name != "*" and "*" in name.rpartition(".")[2]:
        # 192.168.1.* would match 192.168.1.example.com, localhost* localhost.example.com
        raise ValueError(f"{text!r} is not an origin: its host must not end with *")
    if port == {"http": "80", "https": "443"}[scheme]:
        port = None
    return f"{name}:{port}" if port else name


def state_url(text: str) -> str:
    if not text:
        return ""
    parts = _split(text)
    if parts.scheme == "sqlite":
        if not text.startswith("sqlite:///") or text == "sqlite:///":
            raise ValueError("must be sqlite:/// followed by a file path")
        return text
    if parts.scheme in ("redis", "rediss", "unix"):
        if not text.startswith(f"{parts.scheme}://"):
            raise ValueError(f"must start with {parts.scheme}://")
        _check_redis_url(parts)
        return text
    raise ValueError("must start with sqlite:/// or redis://")


def _check_redis_url(parts: SplitResult) -> None:
    """Reject what the Redis client would ignore, such as a database that is not a number."""
    if parts.fragment:
        raise ValueError("contains #; in a password it is written %23")
    databases = [value for name, value in parse_qsl(parts.query) if name == "db"]
    if parts.scheme == "unix":
        if parts.netloc.rpartition("@")[2] or len(parts.path) < 2:
            raise ValueError("must be unix:// followed by the path of Redis's socket")
    else:
        if not parts.hostname:
            raise ValueError("has no host name")
        _check_port(parts)
        if parts.path not in ("", "/"):
            databases.append(parts.path.removeprefix("/"))
    if not all(re.fullmatch(r"[0-9]{1,9}", database) for database in databases):
        raise ValueError("must have a number as its database, as in redis://host:6379/0")


def _check_port(parts: SplitResult) -> None:
    try:
        port = parts.port
    except ValueError:
        raise ValueError("has a bad port") from None
    if port == 0:
        raise ValueError("has a bad port")


def _split(text: str) -> SplitResult:
    try:
        return urlsplit(text)
    except ValueError:
        # the original message contains the URL, which may contain a password
        raise ValueError("is not a URL") from None


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]
