"""How the gateway is served: by gunicorn (``gunicorn.conf.py`` and ``serve``) or, where there is
none, by gevent's own WSGI server in one process."""

from __future__ import annotations

import logging.config
import os
import signal
import socket
import sqlite3
import stat
import sys
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import gevent
from flask import Flask
from gevent.event import Event
from gevent.pool import Pool

from gateway.serving import logs
from gateway.settings import Settings, SettingsError, load, read_environment
from gateway.state import open_sqlite, sqlite_path

#: Connections of one worker; each may be a stream.
WORKER_CONNECTIONS = 4096
#: Seconds that running requests get after SIGTERM.
GRACEFUL_TIMEOUT = 30
MOST_WORKERS = 4
BACKLOG = 2048

logger = logging.getLogger(__name__)


def gunicorn_options(settings: Settings) -> dict[str, Any]:
    """gunicorn's settings by their names in a configuration file."""
    # gunicorn is missing on Windows
    from gateway.serving import worker

    return {
        "bind": bind_address(settings),
        "workers": workers(),
        "worker_class": "gateway.serving.worker.Worker",
        "worker_connections": WORKER_CONNECTIONS,
        "backlog": BACKLOG,
        "graceful_timeout": GRACEFUL_TIMEOUT,
        "timeout": 60,
        # the SDK's client and gevent's hub must be made in the worker, after the fork
        "preload_app": False,
        "proc_name": "lmstudio-gateway",
        "accesslog": None,
        "logger_class": "gateway.serving.worker.Logger",
        "loglevel": settings.log_level.replace("warn", "warning"),
        "logconfig_dict": logs.configuration(settings.log_level, settings.log_format),
        "control_socket_disable": True,
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


def serve_gunicorn(first: Settings) -> None:
    """Run gunicorn in this process until a signal ends it; SIGHUP reads the settings again."""
    if not os.environ.get("WEB_CONCURRENCY"):
        # empty, as in .env.example, it would be an error to gunicorn
        os.environ.pop("WEB_CONCURRENCY", None)
    from gunicorn.app.base import BaseApplication

    class Application(BaseApplication):  # type: ignore[misc]
        settings = first

        def load_config(self) -> None:
            for name, value in gunicorn_options(self.settings).items():
                self.cfg.set(name, value)

        def load(self) -> Any:
            # in the worker, after the fork
            from gateway.app import create_app

            return create_app(self.settings)

        def reload(self) -> None:
            """SIGHUP: what .env says now; bad settings leave everything as it was."""
            try:
                self.settings = load()
            except SettingsError as error:
                for problem in error.problems:
                    logger.error("settings not reloaded: %s", problem)
            super().reload()

    Application().run()


def serve_gevent(settings: Settings) -> None:
    """Serve from this process alone, where gunicorn does not run (Windows), until SIGTERM (or
    Ctrl-C) ends it. Standard library modules must have been patched by gevent."""
    # heavy, and not needed by gunicorn's master
    from gateway.app import create_app
    from gateway.serving.connection import Server, drain

    logging.config.dictConfig(logs.configuration(settings.log_level, settings.log_format))
    app = create_app(settings)
    parts = app.extensions["gateway"]
    pool = Pool(WORKER_CONNECTIONS)
    server = Server(_listener(settings), app, spawn=pool, log=None, error_log=None)
    ended = Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(sig, ended.set)
    parts.start()
    server.start()
    logger.info("Worker serves (pid: %s)", os.getpid())
    ended.wait()
    server.close()
    ending = gevent.spawn(drain, app, [server], GRACEFUL_TIMEOUT)
    pool.join(GRACEFUL_TIMEOUT)
    ending.kill()
    server.stop(timeout=1)
    parts.stop()
    _unlink_socket(settings)


def _listener(settings: Settings) -> Any:
    """The listening socket; exit status 1 in words when it can't be had."""
    host = settings.gateway_host
    if host.startswith("unix:") and not hasattr(socket, "AF_UNIX"):
        problem = "GATEWAY_HOST: Python has no Unix sockets here (example: 127.0.0.1)"
        raise _exit(SettingsError([problem]))
    try:
        if host.startswith("unix:"):
            _unlink_socket(settings)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(host.removeprefix("unix:"))
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.socket(family)
            if os.name == "posix":  # elsewhere it means that others may take the port over
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listener.bind((host, settings.gateway_port))
        listener.listen(BACKLOG)
    except OSError as fault:
        print(f"cannot listen on {bind_address(settings)}: {fault.strerror}", file=sys.stderr)
        raise SystemExit(1) from None
    listener.setblocking(False)
    return listener


def _unlink_socket(settings: Settings) -> None:
    """Remove the Unix socket, which stays when a process ends; nothing else of that name."""
    path = settings.gateway_host.removeprefix("unix:")
    if path != settings.gateway_host:
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode):
                os.unlink(path)


def _exit(error: SettingsError) -> SystemExit:
    for problem in error.problems:
        print(problem, file=sys.stderr)
    return SystemExit(1)
