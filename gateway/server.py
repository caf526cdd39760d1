"""How gunicorn serves the gateway: the settings' values for ``gunicorn.conf.py`` and ``serve``."""

from __future__ import annotations

import os
import sys
from typing import Any

from gateway import logs, worker
from gateway.settings import Settings, SettingsError, load, read_environment

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
        # X-Forwarded-* and friends are read by gateway.access alone
        "forwarded_allow_ips": "",
        "forwarder_headers": "",
        # methods "nobody knows" are LM Studio's to refuse
        "permit_unconventional_http_method": True,
        "on_starting": worker.on_starting,
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
        for problem in error.problems:
            print(problem, file=sys.stderr)
        raise SystemExit(1) from None


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
