"""gunicorn's side of the gateway: the worker class and the master's hooks."""

from __future__ import annotations

import gc
import itertools
import os
import signal
from functools import partial
from importlib import import_module
from typing import Any

import gevent
from gunicorn import glogging
from gunicorn.workers.ggevent import GeventWorker

from gateway.logs import stderr
from gateway.observe import LOST, SharedPages
from gateway.serving import descriptors
from gateway.serving.connection import Server, drain
from gateway.serving.reload import Reloader, SettingsPage, apply, reload_in_place
from gateway.settings import leave_to_workers, warnings

#: Pages for the counters of workers, at least: more may start than run at a time.
MIN_SLOTS = 64


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
        #: Where this worker counts; see :func:`pre_fork`.
        self.pages: Any = None
        self.slot = 0
        self.settings_page: Any = None

    def server_class(self, *args: Any, **kwargs: Any) -> Server:
        """Create the server of a listening socket; gunicorn calls this for each."""
        self._servers.append(Server(*args, **kwargs))
        return self._servers[-1]

    def run(self) -> None:
        parts = self.wsgi.extensions["gateway"]
        stderr.start()
        parts.metrics.attach(self.pages, self.slot)
        self._apply_settings()  # a signal may have come too early
        parts.start()
        self.log.info("Worker ready (pid: %s)", self.pid)
        try:
            super().run()
        finally:
            parts.stop()
            stderr.flush()

    def handle_usr1(self, sig: int, frame: Any) -> None:
        """Apply the settings that the master has read again."""
        super().handle_usr1(sig, frame)
        # in a greenlet: a signal handler must not take locks
        gevent.spawn(self._apply_settings)

    def _apply_settings(self) -> None:
        settings = self.settings_page.settings()
        if settings is not None:
            apply(self.wsgi.extensions["gateway"], settings)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Drain on SIGTERM: accept no more connections, and see :func:`.connection.drain`."""
        super().handle_exit(sig, frame)
        if self.booted:
            # in a greenlet: a signal handler must not take locks
            gevent.spawn(drain, self.wsgi, self._servers, self.cfg.graceful_timeout)


def on_starting(server: Any) -> None:
    """Log warnings about the settings, raise the limit of open files, and import and create what
    the workers share."""
    for warning in warnings():
        server.log.warning("%s", warning)
    descriptors.raise_limit()
    import_module("gateway.app")
    server.reloader, server.settings_page = Reloader(), SettingsPage()
    leave_to_workers(server.reloader.environment)
    server.reload = partial(reload_in_place, server)
    server.pages = SharedPages(slots=max(MIN_SLOTS, 2 * server.num_workers))
    gc.collect()
    # a garbage collection in a worker would write to the shared memory, and so copy it
    gc.freeze()


def pre_fork(server: Any, worker: Any) -> None:
    """Give a worker a free page for its counters."""
    taken = {other.slot for other in server.WORKERS.values()}
    worker.pages, worker.settings_page = server.pages, server.settings_page
    worker.slot = next(slot for slot in itertools.count(1) if slot not in taken)


def post_fork(server: Any, worker: Any) -> None:
    """Let SIGTERM end a worker that is still starting.

    Until gunicorn installs the worker's own signal handlers, the worker has those of the master,
    which would swallow the signal while the master waits for the worker to exit.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def child_exit(server: Any, worker: Any) -> None:
    """Keep what a worker counted that has exited."""
    server.pages.fold(worker.slot, LOST)
