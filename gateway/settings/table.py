"""Declares every setting in one table; parsing, error messages and the tests of the documentation
are based on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gateway.settings import parsers
from gateway.settings.parsers import AddressSet, Key


@dataclass(frozen=True)
class Setting:
    """One row of the table. For ``parse``, see :mod:`.parsers`."""

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
    """The parsed settings; the attribute for ``NAME`` is ``name``. Times are in seconds."""

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


#: Every setting that the gateway reads itself (gunicorn reads WEB_CONCURRENCY).
TABLE: tuple[Setting, ...] = (
    Setting(
        "LMSTUDIO_BASE_URL",
        "http://127.0.0.1:1234",
        parsers.base_url,
        "http://127.0.0.1:1234",
        "address of LM Studio's server",
    ),
    Setting(
        "LMSTUDIO_API_TOKEN",
        "",
        parsers.api_token,
        "sk-lm-AAAAAAAA:BBBBBBBBBBBBBBBBBBBB",
        "token for an LM Studio that requires authentication",
    ),
    Setting("GATEWAY_HOST", "127.0.0.1", parsers.host, "127.0.0.1", "bind address"),
    Setting("GATEWAY_PORT", "8002", parsers.integer(0, 65535), "8002", "bind port"),
    Setting("GATEWAY_API_KEY", "", parsers.parse_keys, "app:s3cr3t", "accepted keys"),
    Setting(
        "GATEWAY_ADMIN_KEY",
        "",
        parsers.parse_keys,
        "ops:s3cr3t",
        "keys for /admin, /debug, /metrics, /api",
    ),
    Setting(
        "ALLOW_UNAUTHENTICATED",
        "false",
        parsers.boolean,
        "true",
        "allow starting on a reachable address without any key",
    ),
    Setting("IP_ALLOWLIST", "*", parsers.addresses("*"), "192.168.0.0/16,::1", "who may connect"),
    Setting(
        "TRUSTED_PROXIES",
        "",
        parsers.addresses("unix"),
        "127.0.0.1,unix",
        "proxies whose X-Forwarded-For is trusted",
    ),
    Setting(
        "REQUIRE_AUTH_FOR_HEALTH", "false", parsers.boolean, "false", "whether /health needs a key"
    ),
    Setting(
        "LOG_LEVEL", "info", parsers.choice("error", "warn", "info", "debug"), "info", "verbosity"
    ),
    Setting("LOG_FORMAT", "text", parsers.choice("text", "json"), "text", "format of log lines"),
    Setting(
        "PROXY_TIMEOUT", "120000", parsers.timeout, "120000", "ms for a non-streaming exchange"
    ),
    Setting("PROXY_STREAM_TIMEOUT", "0", parsers.timeout, "0", "ms of silence allowed in a stream"),
    Setting(
        "MAX_BODY_BYTES",
        "67108864",
        parsers.integer(1, 1 << 40),
        "67108864",
        "largest accepted request body",
    ),
    Setting(
        "SDK_MAX_ATTEMPTS", "3", parsers.integer(1, 100), "3", "connection attempts to LM Studio"
    ),
    Setting("SDK_RETRY_DELAY", "2000", parsers.milliseconds, "2000", "ms between two attempts"),
    Setting(
        "STATE_URL",
        "",
        parsers.state_url,
        "sqlite:////var/lib/lmstudio-gateway/state.db",
        "where the active model and the events are kept",
    ),
    Setting(
        "CORS_ORIGINS",
        "",
        parsers.origins,
        "https://chat.example.org,vscode-webview://*",
        "origins of browser and desktop apps",
    ),
)
