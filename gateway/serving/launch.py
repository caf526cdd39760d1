"""Starts the gateway: under gunicorn (``gunicorn.conf.py`` and ``serve``) or, where gunicorn is
missing, under gevent's own WSGI server in one process."""

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

from gateway import logs
from gateway.logs import stderr
from gateway.serving import descriptors
from gateway.serving.reload import Reloader, apply
from gateway.settings import Settings, SettingsError, load, read_environment, warnings
from gateway.state import check_redis, open_sqlite, sqlite_path

#: Client connections of one worker; each may be a stream.
WORKER_CONNECTIONS = 4096
#: Seconds that requests in flight get after SIGTERM: the grace period.
GRACEFUL_TIMEOUT = 30
#: The most workers that are started unless ``WEB_CONCURRENCY`` asks for more.
MAX_WORKERS = 4
#: Connections that the kernel queues until a worker accepts them.
BACKLOG = 2048

#: The mode of the Unix socket: a proxy connects as a member of the gateway's group.
SOCKET_MODE = 0o660

logger = logging.getLogger(__name__)


def gunicorn_options(settings: Settings) -> dict[str, Any]:
    """gunicorn's settings, by the names that they have in a gunicorn configuration file."""
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
        # the SDK's client and gevent's hub must be created in the worker, after the fork
        "preload_app": False,
        # of the Unix socket and of gunicorn's own files; see SOCKET_MODE
        "umask": 0o777 & ~SOCKET_MODE,
        "proc_name": "lmstudio-gateway",
        "accesslog": None,
        "logger_class": "gateway.serving.worker.Logger",
        "loglevel": settings.log_level.replace("warn", "warning"),
        "logconfig_dict": logs.configuration(settings.log_level, settings.log_format),
        "control_socket_disable": True,
        "on_starting": worker.on_starting,
        "pre_fork": worker.pre_fork,
        "post_fork": worker.post_fork,
        "child_exit": worker.child_exit,
        "worker_tmp_dir": "/dev/shm" if os.path.isdir("/dev/shm") else None,
    }


def bind_address(settings: Settings) -> str:
    """``host:port``, ``[v6]:port`` or ``unix:path``."""
    host = settings.gateway_host
    if host.startswith("unix:"):
        return host
    return f"[{host}]:{settings.gateway_port}" if ":" in host else f"{host}:{settings.gateway_port}"


def workers() -> Any:
    """``WEB_CONCURRENCY`` unparsed, as gunicorn validates it; else one per core, at most four."""
    chosen = read_environment().get("WEB_CONCURRENCY")
    return chosen or min(MAX_WORKERS, os.cpu_count() or 1)


def settings_or_exit() -> Settings:
    """Load the settings. Bad ones are printed to stderr, one line for each problem, and raise
    SystemExit with status 1."""
    try:
        return load()
    except SettingsError as error:
        raise _exit(error) from None


def checked_settings_or_exit() -> Settings:
    """Like :func:`settings_or_exit`, and check that the shared state can be opened."""
    settings = settings_or_exit()
    try:
        check_state(settings.state_url)
    except SettingsError as error:
        raise _exit(error) from None
    return settings


def check_state(url: str) -> None:
    """Open the SQLite state once, so that a fault is one readable line and not a traceback from
    every worker. Redis need not be up yet, as the gateway serves without it.

    Raises SettingsError.
    """
    path = sqlite_path(url, Flask("gateway", static_folder=None).instance_path)
    if path is None:
        if find_spec("redis") is None:
            extra = "pip install 'lmstudio-gateway[redis]'"
            raise SettingsError([f"STATE_URL: needs the Redis client ({extra})"])
        try:
            check_redis(url)
        except ValueError as fault:
            raise SettingsError([f"STATE_URL: {fault} (example: redis://host:6379/0)"]) from None
        return
    try:
        open_sqlite(path).close()
    except (OSError, sqlite3.Error) as fault:
        raise SettingsError([f"STATE_URL: cannot open {path}: {fault}"]) from None


def serve_gunicorn(initial: Settings) -> None:
    """Run gunicorn in this process until a signal ends it; SIGHUP reads the settings again."""
    if not os.environ.get("WEB_CONCURRENCY"):
        # gunicorn rejects an empty value, which .env.example has
        os.environ.pop("WEB_CONCURRENCY", None)
    # gunicorn is missing on Windows
    from gunicorn.app.base import BaseApplication

    class Application(BaseApplication):  # type: ignore[misc]
        def load_config(self) -> None:
            for name, value in gunicorn_options(initial).items():
                self.cfg.set(name, value)

        def load(self) -> Any:
            # heavy; in the worker, after the fork
            from gateway.app import create_app

            return create_app()

    Application().run()


def serve_gevent(settings: Settings) -> None:
    """Serve from this process alone until SIGTERM or Ctrl-C, where gunicorn does not run (Windows).

    gevent must have patched the standard library.
    """
    # heavy, and not needed by gunicorn's master
    from gateway.app import create_app
    from gateway.serving.connection import Server, drain

    logging.config.dictConfig(logs.configuration(settings.log_level, settings.log_format))
    for warning in warnings():
        logger.warning("%s", warning)
    descriptors.raise_limit()
    app = create_app(settings)
    parts = app.extensions["gateway"]
    pool = Pool(WORKER_CONNECTIONS)
    server = Server(_listener(settings), app, spawn=pool, log=None, error_log=None)
    stopping = Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(sig, stopping.set)
    if hasattr(signal, "SIGHUP"):  # Windows has none
        gevent.signal_handler(signal.SIGHUP, _reload, Reloader(), parts)
    stderr.start()
    parts.start()
    server.start()
    logger.info("Worker ready (pid: %s)", os.getpid())
    stopping.wait()
    server.close()
    draining = gevent.spawn(drain, app, [server], GRACEFUL_TIMEOUT)
    pool.join(GRACEFUL_TIMEOUT)
    draining.kill()
    server.stop(timeout=1)
    parts.stop()
    _unlink_socket(settings)


def _reload(reloader: Reloader, parts: Any) -> None:
    environment = reloader.reload()
    if environment is not None:
        apply(parts, load(environment))


def _listener(settings: Settings) -> Any:
    """The listening socket. An address that can't be used is reported on stderr and raises
    SystemExit with status 1."""
    host = settings.gateway_host
    if host.startswith("unix:") and not hasattr(socket, "AF_UNIX"):
        problem = "GATEWAY_HOST: Python has no Unix sockets on this system (example: 127.0.0.1)"
        raise _exit(SettingsError([problem]))
    try:
        if host.startswith("unix:"):
            _unlink_socket(settings)
            listener = socket.socket(socket.AF_UNIX)
            path = host.removeprefix("unix:")
            listener.bind(path)
            os.chmod(path, SOCKET_MODE)  # nobody can connect yet, whatever the umask
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.socket(family)
            if os.name == "posix":  # elsewhere it lets other processes take the port over
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
    """Remove the Unix socket, which outlives its process; a file of another kind stays."""
    path = settings.gateway_host.removeprefix("unix:")
    if path != settings.gateway_host:
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode):
                os.unlink(path)


def _exit(error: SettingsError) -> SystemExit:
    """Print the problems to stderr; the caller raises what this returns."""
    for problem in error.problems:
        print(problem, file=sys.stderr)
    return SystemExit(1)
