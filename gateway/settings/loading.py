"""Reading the settings, from the environment or from ``.env`` in the current directory."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from typing import Any

from dotenv import dotenv_values

from gateway.settings.table import TABLE, Settings

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


class SettingsError(Exception):
    """Every problem of the settings at once; :attr:`problems` has one printable line for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


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
