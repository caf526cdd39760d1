"""How gunicorn serves the gateway: the settings' values for ``gunicorn.conf.py`` and ``serve``."""

from __future__ import annotations

import os
import sqlite3
import sys
from importlib.util import find_spec
from typing import Any

from flask import Flask

from gateway import logs, worker
from gateway.settings import Settings, SettingsError, load, read_environment
from gateway.store import open_sqlite, sqlite_path

#: Connections of one worker; each may be a stream.
WORKER_CONNECTIONS = 4096
#: Seconds that running requests get after SIGTERM.
GRACEFUL_TIMEOUT = 30
#: Seconds that an idle client connection is kept, and that a request's head may take to come.
KEEP_ALIVE = 65
MOST_WORKERS = 4


def gunicorn_options(settings: Settings) -> dict[str, Any]:
    """gunicorn's settings by their names in a configuration file."""
    return {
        "bind": bind_address(settings),
        "workers": workers(),
        "worker_class": "gateway.worker.Worker",
        "worker_connections": WORKER_CONNECTIONS,
        "backlog": 2048,
        "keepalive": KEEP_ALIVE,
        "graceful_timeout": GRACEFUL_TIMEOUT,
        "timeout": 60,
        # the SDK's client and gevent's hub must be made in the worker, after the fork
        "preload_app": False,
        "proc_name": "lmstudio-gateway",
        "accesslog": None,
        "logger_class": "gateway.worker.Logger",
        "loglevel": settings.log_level.replace("warn", "warning"),
        "logconfig_dict": logs.configuration(settings.log_level, settings.log_format),
        "control_socket_disable": True,
        # X-Forwarded-* and friends are read by gateway.access alone: gunicorn takes nothing from
        # them, and so need not look at the peer's address for each request
        "forwarded_allow_ips": "*",
        "secure_scheme_headers": {},
        "forwarder_headers": "",
        # methods "nobody knows" are LM Studio's to refuse
        "permit_unconventional_http_method": True,
        "on_starting": worker.on_starting,
        "post_fork": worker.post_fork,
        "child_exit": worker.child_exit,
        "on_exit": worker.on_exit,
        "worker_tmp_dir": "/dev/shm" if os.path.isdir("/dev/shm") else None,
    }


def bind_address(settings: Settings) -> str:
    """``host:port``, ``[v6]:port`` or ``unix:path``."""
    host = settings.gateway_host
    if host.startswith("unix:"):
        return host
    return f"[{host}]:{settings.gateway_port}" if ":" in host else f"{host}:{settings.gateway_port}"


def workers() -> Any:
    """``WEB_CONCURRENCY`` as it stands (gunicorn judges it), else one a core, at most four."""
    chosen = read_environment().get("WEB_CONCURRENCY")
    return chosen or min(MOST_WORKERS, os.cpu_count() or 1)


def settings_or_exit() -> Settings:
    """The settings; with bad ones, one line for each on stderr and exit status 1."""
    try:
        return load()
    except SettingsError as error:
        raise _exit(error) from None


def servable_or_exit() -> Settings:
    """The settings, with a state that can be opened; else like :func:`settings_or_exit`."""
    settings = settings_or_exit()
    try:
        check_state(settings.state_url)
    except SettingsError as error:
        raise _exit(error) from None
    return settings


def check_state(url: str) -> None:
    """Open the SQLite state once, so that the start fails in words and not in every worker. (A
    Redis may come later: the gateway serves without it.)"""
    path = sqlite_path(url, Flask("gateway", static_folder=None).instance_path)
    if path is None:
        if find_spec("redis") is None:
            extra = "pip install 'lmstudio-gateway[redis]'"
            raise SettingsError([f"STATE_URL: needs the Redis client ({extra})"])
        return
    try:
        open_sqlite(path).close()
    except (OSError, sqlite3.Error) as fault:
        raise SettingsError([f"STATE_URL: cannot open {path}: {fault}"]) from None


def serve(settings: Settings) -> None:
    """Run gunicorn in this process until a signal ends it."""
    from gunicorn.app.base import BaseApplication

    class Application(BaseApplication):  # type: ignore[misc]
        def load_config(self) -> None:
            for name, value in gunicorn_options(settings).items():
                self.cfg.set(name, value)

        def load(self) -> Any:
            from gateway.app import create_app

            return create_app(settings)

    Application().run()


def _exit(error: SettingsError) -> SystemExit:
    for problem in error.problems:
        print(problem, file=sys.stderr)
    return SystemExit(1)
