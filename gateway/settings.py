"""The settings: one declared table that feeds parsing, error lines and documentation tests.

A setting comes from the environment or from ``.env`` in the current directory; the former wins.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from dotenv import dotenv_values

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: Keys that stand in examples and tutorials; on a reachable address they protect nothing.
PLACEHOLDER_KEYS = frozenset(
    {
        "change-me-please",
        "change-me",
        "changeme",
        "replace-me",
        "your-api-key",
        "your-api-key-here",
        "your-secret-key",
        "password",
        "secret",
    }
)

_KEY_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_API_TOKEN = re.compile(r"sk-lm-[A-Za-z0-9]{8}:[A-Za-z0-9]{20}")


class SettingsError(Exception):
    """Every problem of the settings at once; :attr:`problems` has one printable line for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Key:
    """An accepted key and the name under which its requests are recorded."""

    name: str
    secret: str


@dataclass(frozen=True)
class AddressSet:
    """A list of networks, perhaps with ``*`` (everybody) or ``unix`` (peers on a Unix socket)."""

    networks: tuple[Network, ...] = ()
    everybody: bool = False
    unix: bool = False


@dataclass(frozen=True)
class Setting:
    """One row of the table. ``parse`` raises ValueError with the fault, never with a secret."""

    variable: str
    default: str
    parse: Callable[[str], Any]
    example: str
    meaning: str

    @property
    def attribute(self) -> str:
        return self.variable.lower()


@dataclass(frozen=True)
class Settings:
    """The parsed settings; the attribute of ``NAME`` is ``name``. Times are in seconds."""

    lmstudio_base_url: str
    lmstudio_api_token: str
    gateway_host: str
    gateway_port: int
    gateway_api_key: tuple[Key, ...]
    gateway_admin_key: tuple[Key, ...]
    allow_unauthenticated: bool
    ip_allowlist: AddressSet
    trusted_proxies: AddressSet
    require_auth_for_health: bool
    log_level: str
    log_format: str
    proxy_timeout: float | None
    proxy_stream_timeout: float | None
    max_body_bytes: int
    sdk_max_attempts: int
    sdk_retry_delay: float
    state_url: str
    cors_origins: frozenset[str]


# Parsers -------------------------------------------------------------------------------------


def _base_url(text: str) -> str:
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
        raise ValueError("must be the server's root, without a path")
    if re.search(r"[\s\x00-\x1f]", text):
        raise ValueError("contains white space")
    return f"{parts.scheme}://{parts.netloc}"


def _api_token(text: str) -> str:
    if text and not _API_TOKEN.fullmatch(text):
        raise ValueError("is not an LM Studio API token")
    return text


def _host(text: str) -> str:
    if text.startswith("unix:"):
        if len(text) == len("unix:"):
            raise ValueError("names no socket path")
        return text
    if not text or re.search(r"[\s/]", text):
        raise ValueError("is not a host name or address")
    return text.strip("[]")


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return parse


def _milliseconds(text: str) -> float:
    return _integer(0, 86_400_000)(text) / 1000


def _timeout(text: str) -> float | None:
    """Milliseconds, 0 for no limit."""
    return _milliseconds(text) or None


def _boolean(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("true", "1", "yes", "on"):
        return True
    if lowered in ("false", "0", "no", "off"):
        return False
    raise ValueError("must be true or false")


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return text.lower()

    return parse


def parse_keys(text: str) -> tuple[Key, ...]:
    """``key`` or ``name:key``, comma-separated; a nameless key is called ``key-<position>``."""
    keys = []
    for position, item in enumerate(_items(text), start=1):
        name, colon, secret = item.partition(":")
        if not colon:
            name, secret = f"key-{position}", item
        if not _KEY_NAME.fullmatch(name):
            raise ValueError(f"item {position}: a name has letters, digits, '.', '_' and '-' only")
        if not re.fullmatch(r"[\x21-\x7e]+", secret):
            raise ValueError(f"item {position}: a key is one or more visible ASCII characters")
        keys.append(Key(name, secret))
    return tuple(keys)


def _addresses(*words: str) -> Callable[[str], AddressSet]:
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


def _origins(text: str) -> frozenset[str]:
    origins = _items(text)
    for origin in origins:
        parts = _split(origin)
        exact = origin == f"{parts.scheme}://{parts.netloc}" and "@" not in origin
        if parts.scheme not in ("http", "https") or not parts.hostname or not exact:
            raise ValueError(f"{origin!r} is not an origin (scheme://host[:port], nothing behind)")
    return frozenset(origins)


def _state_url(text: str) -> str:
    if not text:
        return ""
    parts = _split(text)
    if parts.scheme == "sqlite":
        if not text.startswith("sqlite:///") or text == "sqlite:///":
            raise ValueError("a SQLite state is sqlite:/// and a file path")
        return text
    if parts.scheme in ("redis", "rediss", "unix"):
        return text
    raise ValueError("must start with sqlite:/// or redis://")


def _split(text: str) -> SplitResult:
    try:
        return urlsplit(text)
    except ValueError:
        # its own message would tell the URL, and with it a password
        raise ValueError("is not a URL") from None


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


#: Every setting that the gateway reads itself (gunicorn reads WEB_CONCURRENCY).
TABLE: tuple[Setting, ...] = (
    Setting(
        "LMSTUDIO_BASE_URL",
        "http://127.0.0.1:1234",
        _base_url,
        "http://127.0.0.1:1234",
        "LM Studio's server",
    ),
    Setting(
        "LMSTUDIO_API_TOKEN",
        "",
        _api_token,
        "sk-lm-AAAAAAAA:BBBBBBBBBBBBBBBBBBBB",
        "token of an LM Studio with Require Authentication on",
    ),
    Setting("GATEWAY_HOST", "127.0.0.1", _host, "127.0.0.1", "bind address"),
    Setting("GATEWAY_PORT", "8002", _integer(0, 65535), "8002", "bind port"),
    Setting("GATEWAY_API_KEY", "", parse_keys, "app:s3cr3t", "accepted keys"),
    Setting(
        "GATEWAY_ADMIN_KEY", "", parse_keys, "ops:s3cr3t", "keys for /admin, /debug, /metrics, /api"
    ),
    Setting(
        "ALLOW_UNAUTHENTICATED",
        "false",
        _boolean,
        "true",
        "start on a reachable address without any key",
    ),
    Setting("IP_ALLOWLIST", "*", _addresses("*"), "192.168.0.0/16,::1", "who may connect"),
    Setting(
        "TRUSTED_PROXIES",
        "",
        _addresses("unix"),
        "127.0.0.1,unix",
        "proxies whose X-Forwarded-For is believed",
    ),
    Setting("REQUIRE_AUTH_FOR_HEALTH", "false", _boolean, "false", "whether /health needs a key"),
    Setting("LOG_LEVEL", "info", _choice("error", "warn", "info", "debug"), "info", "verbosity"),
    Setting("LOG_FORMAT", "text", _choice("text", "json"), "text", "form of the log lines"),
    Setting("PROXY_TIMEOUT", "120000", _timeout, "120000", "ms for a plain exchange"),
    Setting("PROXY_STREAM_TIMEOUT", "0", _timeout, "0", "ms of silence allowed in a stream"),
    Setting(
        "MAX_BODY_BYTES",
        "67108864",
        _integer(1, 1 << 40),
        "67108864",
        "largest accepted request body",
    ),
    Setting("SDK_MAX_ATTEMPTS", "3", _integer(1, 100), "3", "connection attempts to LM Studio"),
    Setting("SDK_RETRY_DELAY", "2000", _milliseconds, "2000", "ms between the attempts"),
    Setting(
        "STATE_URL",
        "",
        _state_url,
        "sqlite:////var/lib/lmstudio-gateway/state.db",
        "where the active model and the events are kept",
    ),
    Setting("CORS_ORIGINS", "", _origins, "https://chat.example.org", "origins of browser apps"),
)


# Reading -------------------------------------------------------------------------------------


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from ``environ`` (default: the process's, over ``.env``).

    Raises :class:`SettingsError` naming every bad value at once.
    """
    source = read_environment() if environ is None else environ
    values: dict[str, Any] = {}
    problems: list[str] = []
    for setting in TABLE:
        text = source.get(setting.variable, "").strip() or setting.default
        try:
            values[setting.attribute] = setting.parse(text)
        except ValueError as fault:
            problems.append(f"{setting.variable}: {fault} (example: {setting.example})")
    if not problems:
        settings = Settings(**values)
        problems = _unsafe(settings)
        if not problems:
            return settings
    raise SettingsError(problems)


def read_environment() -> dict[str, str]:
    """``.env`` of the current directory, overlaid with the process's environment."""
    return {**read_env_file(), **os.environ}


def read_env_file() -> dict[str, str]:
    """``.env`` of the current directory alone; empty without one. Raises SettingsError."""
    try:
        return {name: text for name, text in dotenv_values(".env").items() if text is not None}
    except (OSError, UnicodeDecodeError):
        raise SettingsError([".env: can't be read as UTF-8 text"]) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``; a name counts only when it is ``localhost``."""
    if host.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _unsafe(settings: Settings) -> list[str]:
    """Reasons why these (well-formed) settings must not be served."""
    if is_loopback(settings.gateway_host):
        return []
    problems = []
    keys = (
        ("GATEWAY_API_KEY", settings.gateway_api_key),
        ("GATEWAY_ADMIN_KEY", settings.gateway_admin_key),
    )
    if not any(values for _, values in keys) and not settings.allow_unauthenticated:
        problems.append(
            "GATEWAY_API_KEY: is empty, but GATEWAY_HOST is reachable from other machines"
            " (example: app:s3cr3t, or ALLOW_UNAUTHENTICATED=true to serve everybody)"
        )
    problems += [
        f"{variable}: is a well-known placeholder (example: {_example(variable)})"
        for variable, values in keys
        if any(key.secret.lower() in PLACEHOLDER_KEYS for key in values)
    ]
    return problems


def _example(variable: str) -> str:
    return next(setting.example for setting in TABLE if setting.variable == variable)
