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

from gateway.serving.connection import Server, drain

#: prometheus-client's own variable for multiprocess mode.
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_METRICS_PREFIX = "lmstudio-gateway-metrics-"


class Logger(glogging.Logger):  # type: ignore[misc]
    """gunicorn's logger without its access log: the gateway writes its own."""

    def access(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: not even the making of a line that nobody prints."""


class Worker(GeventWorker):  # type: ignore[misc]
    """gunicorn's gevent worker with the gateway's own connections, which tells the application when
    it begins and ends to serve, and does not wait at its end for client connections that are merely
    kept open."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._servers: list[Server] = []

    def server_class(self, *args: Any, **kwargs: Any) -> Server:
        """What gunicorn makes for each listening socket."""
        self._servers.append(Server(*args, **kwargs))
        return self._servers[-1]

    def run(self) -> None:
        parts = self.wsgi.extensions["gateway"]
        parts.start()
        self.log.info("Worker serves (pid: %s)", self.pid)
        try:
            super().run()
        finally:
            parts.stop()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM: accept no more; event streams end now, inference streams may finish."""
        super().handle_exit(sig, frame)
        if self.booted:
            # in a greenlet: a signal handler must not take locks
            gevent.spawn(drain, self.wsgi, self._servers, self.cfg.graceful_timeout)


def on_starting(server: Any) -> None:
    """Make the directory of the metrics' counter files, remove those of masters that died without
    cleaning up, and import what the workers need: once, and into memory that they share."""
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{_METRICS_PREFIX}*"):
        pid = left.name.removeprefix(_METRICS_PREFIX).partition("-")[0]
        if pid.isdigit() and Path("/proc/self").exists() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    os.environ[METRICS_VARIABLE] = tempfile.mkdtemp(prefix=f"{_METRICS_PREFIX}{os.getpid()}-")
    # prometheus-client looks at the variable when it is imported
    import_module("gateway.app")
    gc.collect()
    gc.freeze()  # a collection in a worker would write to the shared memory, and so copy it


def post_fork(server: Any, worker: Any) -> None:
    """Until gunicorn has set the worker's own signal handlers, a SIGTERM would be lost on those
    that the worker inherited from the master, and the master would wait for it in vain."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def child_exit(server: Any, worker: Any) -> None:
    """A worker has died: its gauges count no more."""
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def on_exit(server: Any) -> None:
    """Remove the counter files."""
    shutil.rmtree(os.environ[METRICS_VARIABLE], ignore_errors=True)
