"""``lmstudio-gateway check``: checks whether the gateway can serve with the current settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flask import Flask

from gateway.errors import GatewayError
from gateway.lmstudio import Link, Upstream
from gateway.settings import Settings, warnings
from gateway.state import open_store


def run(settings: Settings) -> int:
    """Check each part in turn and print a line for it, then the warnings.

    Returns the exit status.
    """
    parts: list[tuple[str, Callable[[], str]]] = [
        ("settings", _settings),
        ("state", lambda: _state(settings)),
        ("LM Studio HTTP", lambda: _http(settings)),
        ("LM Studio SDK", lambda: _sdk(settings)),
    ]
    failed = False
    for name, probe in parts:
        try:
            print(f"ok    {name}: {probe()}")
        except GatewayError as error:
            failed = True
            print(f"FAIL  {name}: {error.message}")
    for warning in warnings():
        print(f"warn  {warning}")
    return 1 if failed else 0


def _settings() -> str:
    file = Path(".env").absolute()
    return f"valid, with {file}" if file.exists() else f"valid (there is no {file})"


def _state(settings: Settings) -> str:
    instance = Flask("gateway", static_folder=None).instance_path
    store = open_store(settings.state_url, instance)
    try:
        store.ping()  # opening a Redis store does not connect to it
    finally:
        store.close()
    return "opened" if settings.state_url else f"opened in {Path(instance)}"


def _http(settings: Settings) -> str:
    url = settings.lmstudio_base_url
    try:
        Upstream(settings).greet(5)
    except GatewayError as error:
        raise GatewayError(f"{url}: {error.message}") from None
    return url


def _sdk(settings: Settings) -> str:
    link = Link(settings)
    link.connect()
    count = len(link.downloaded())
    link.close()
    return f"connected, {count} models downloaded"
