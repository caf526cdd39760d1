"""Reads the settings from the environment and from ``.env`` in the current directory."""

from __future__ import annotations

import ipaddress
import json
import os
import stat
from collections.abc import Mapping
from typing import Any

from dotenv import dotenv_values

from gateway.settings.parsers import is_any_site
from gateway.settings.table import TABLE, Settings

#: Keys from examples and tutorials, which protect nothing on a reachable address.
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


#: The variable in which gunicorn's master leaves the validated environment to its workers.
VALIDATED = "LMSTUDIO_GATEWAY_VALIDATED_ENVIRONMENT"


class SettingsError(Exception):
    """The settings are invalid; :attr:`problems` has one printable line for each problem."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from ``environ``, by default from the environment and ``.env``.

    In a worker of gunicorn the default is what its master has validated, whatever ``.env`` says by
    now. Raises :class:`SettingsError` with every problem at once.
    """
    source = _validated_by_master() or read_environment() if environ is None else environ
    values: dict[str, Any] = {}
    problems: list[str] = []
    for setting in TABLE:
        text = source.get(setting.variable, "").strip() or setting.default
        try:
            values[setting.attribute] = setting.parse(text)
        except ValueError as error:
            problems.append(f"{setting.variable}: {error} (example: {setting.example})")
    if not problems:
        settings = Settings(**values)
        problems = _safety_problems(settings)
        if not problems:
            return settings
    raise SettingsError(problems)


def leave_to_workers(environment: Mapping[str, str]) -> None:
    """Let the workers that this process forks from now on load these settings."""
    os.environ[VALIDATED] = json.dumps([os.getpid(), dict(environment)])


def _validated_by_master() -> dict[str, str] | None:
    """What :func:`leave_to_workers` of the parent process left, if this is a worker."""
    pid, environment = json.loads(os.environ.get(VALIDATED, "[0, null]"))
    # a master that another one started (gunicorn's SIGUSR2) reads for itself
    return dict(environment) if pid == os.getppid() else None


def read_environment() -> dict[str, str]:
    """The variables of ``.env`` and of the environment, which wins. Raises SettingsError."""
    return {**read_env_file(), **os.environ}


def read_env_file() -> dict[str, str]:
    """The variables of ``.env`` in the current directory; empty if there is no such file.

    Raises :class:`SettingsError` if it can't be read.
    """
    try:
        return {name: text for name, text in dotenv_values(".env").items() if text is not None}
    except (OSError, UnicodeDecodeError):
        raise SettingsError([".env: can't be read, or is not UTF-8 text"]) from None


def warnings() -> list[str]:
    """What is unwise about the settings but does not stop the start, one line each."""
    found: list[str] = []
    if os.name == "posix":
        try:
            mode = os.stat(".env").st_mode
        except OSError:
            return found
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            found.append(".env: other users of this machine can read or change it (chmod 600 .env)")
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``; the only name that counts is ``localhost``."""
    if host.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _safety_problems(settings: Settings) -> list[str]:
    """The reasons why it is unsafe to start with these settings, although each is valid."""
    problems = []
    if not settings.gateway_api_key and any(map(is_any_site, settings.cors_origins)):
        problems.append(
            "CORS_ORIGINS: with * every web page could use the gateway, which needs no key; set"
            f" GATEWAY_API_KEY or name the origins (example: {_example('CORS_ORIGINS')})"
        )
    if is_loopback(settings.gateway_host):
        return problems
    keys = (
        ("GATEWAY_API_KEY", settings.gateway_api_key),
        ("GATEWAY_ADMIN_KEY", settings.gateway_admin_key),
    )
    if not any(values for _, values in keys) and not settings.allow_unauthenticated:
        problems.append(
            "GATEWAY_API_KEY: is empty, but GATEWAY_HOST is reachable from other machines"
            " (example: app:s3cr3t, or ALLOW_UNAUTHENTICATED=true to serve everyone)"
        )
    problems += [
        f"{variable}: is a well-known placeholder (example: {_example(variable)})"
        for variable, values in keys
        if any(key.secret.lower() in PLACEHOLDER_KEYS for key in values)
    ]
    return problems


def _example(variable: str) -> str:
    return next(setting.example for setting in TABLE if setting.variable == variable)
