"""gunicorn's side of the gateway: the worker class and the master's hooks."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import gevent
from gunicorn import glogging
from gunicorn.workers.ggevent import GeventWorker

from gateway import stderr
from gateway.serving import descriptors
from gateway.serving.connection import Server, drain
from gateway.settings import warnings

#: prometheus-client's environment variable for its multiprocess mode.
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_METRICS_PREFIX = "lmstudio-gateway-metrics-"


class Logger(glogging.Logger):  # type: ignore[misc]
    """gunicorn's logger without the access log, as the gateway writes its own."""

    def access(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: gunicorn would format a line that is never printed."""


class Worker(GeventWorker):  # type: ignore[misc]
    """gunicorn's gevent worker, with the gateway's own connections.

    It starts and stops the application's background work, and does not wait for idle client
    connections when it shuts down.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._servers: list[Server] = []

    def server_class(self, *args: Any, **kwargs: Any) -> Server:
        """Create the server of a listening socket; gunicorn calls this for each."""
        self._servers.append(Server(*args, **kwargs))
        return self._servers[-1]

    def run(self) -> None:
        parts = self.wsgi.extensions["gateway"]
        stderr.start()
        parts.start()
        self.log.info("Worker ready (pid: %s)", self.pid)
        try:
            super().run()
        finally:
            parts.stop()
            stderr.flush()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Drain on SIGTERM: accept no more connections, and see :func:`.connection.drain`."""
        super().handle_exit(sig, frame)
        if self.booted:
            # in a greenlet: a signal handler must not take locks
            gevent.spawn(drain, self.wsgi, self._servers, self.cfg.graceful_timeout)


def on_starting(server: Any) -> None:
    """Log warnings about the settings, raise the limit of open files, create the directory of the
    metrics' counter files, and import what the workers need.

    Directories of masters that died without cleaning up are removed. The workers share the memory
    of what is imported here.
    """
    for warning in warnings():
        server.log.warning("%s", warning)
    descriptors.raise_limit()
    root = Path(tempfile.gettempdir())
    for stale in root.glob(f"{_METRICS_PREFIX}*"):
        pid = stale.name.removeprefix(_METRICS_PREFIX).partition("-")[0]
        if pid.isdigit() and Path("/proc/self").exists() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(stale, ignore_errors=True)
    os.environ[METRICS_VARIABLE] = tempfile.mkdtemp(prefix=f"{_METRICS_PREFIX}{os.getpid()}-")
    # prometheus-client reads the variable when it is imported
    import_module("gateway.app")
    gc.collect()
    # a garbage collection in a worker would write to the shared memory, and so copy it
    gc.freeze()


def post_fork(server: Any, worker: Any) -> None:
    """Let SIGTERM end a worker that is still starting.

    Until gunicorn installs the worker's own signal handlers, the worker has those of the master,
    which would swallow the signal while the master waits for the worker to exit.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def child_exit(server: Any, worker: Any) -> None:
    """Drop the gauges of a worker that has exited."""
    # must not be imported before METRICS_VARIABLE is set
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def on_exit(server: Any) -> None:
    """Remove the counter files."""
    shutil.rmtree(os.environ[METRICS_VARIABLE], ignore_errors=True)
