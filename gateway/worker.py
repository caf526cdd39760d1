"""gunicorn's side of the gateway: the worker class and the master's hooks."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent
from gunicorn import glogging
from gunicorn.http.errors import (
    ExpectationFailed,
    InvalidResponseHeader,
    LimitRequestHeaders,
    LimitRequestLine,
    ParseException,
    UnsupportedTransferCoding,
)
from gunicorn.workers.ggevent import GeventWorker

from gateway import errors
from gateway.access import name_request
from gateway.errors import GatewayError

#: Statuses of what gunicorn's parser refuses; anything else is a 400.
_REFUSALS = {
    LimitRequestLine: 414,
    LimitRequestHeaders: 431,
    ExpectationFailed: 417,
    UnsupportedTransferCoding: 501,
}
#: The path of such a request may not be known: the answer is in the dialect of most clients.
_UNKNOWN_PATH = "/v1/"
_CODE = "bad_request"

#: prometheus-client's own variable for multiprocess mode.
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_METRICS_PREFIX = "lmstudio-gateway-metrics-"
#: Seconds after SIGTERM for which idle client connections are kept.
IDLE_AT_END = 1.0
#: Seconds before the end of the grace period at which running streams get an error event.
LAST_WORDS = 2.0


class Logger(glogging.Logger):  # type: ignore[misc]
    """gunicorn's logger without its access log: the gateway writes its own."""

    def access(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: not even the making of a line that nobody prints."""


class Worker(GeventWorker):  # type: ignore[misc]
    """gunicorn's gevent worker, which tells the application when it begins and ends to serve, and
    does not wait at its end for client connections that are merely kept open."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle: set[_Idle] = set()

    def timeout_ctx(self) -> _Idle:
        """What gunicorn waits in for the next request of a connection."""
        return _Idle(self.cfg.keepalive if self.alive else IDLE_AT_END, self._idle)

    def run(self) -> None:
        parts = self.wsgi.extensions["gateway"]
        parts.start()
        self.log.info("Worker serves (pid: %s)", self.pid)
        try:
            super().run()
        finally:
            parts.stop()

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        """Serve a request; a body is invited (``100 Continue``) when it is read, not before: what
        is refused by its head alone is refused without it."""
        if not req._expected_100_continue:
            return super().handle_request(listener_name, req, sock, addr)
        req._expected_100_continue = False
        body, req.body = req.body, _InvitedBody(req.body, sock)
        try:
            return super().handle_request(listener_name, req, sock, addr)
        finally:
            if not req.body.invited:
                req.force_close()  # whether the body comes all the same can't be known
            req.body = body

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Refuse what gunicorn can't read as HTTP, in JSON instead of gunicorn's HTML page, and
        without the offending bytes in the log: a key may be among them."""
        refused = isinstance(exc, ParseException) and not isinstance(exc, InvalidResponseHeader)
        status = _REFUSALS.get(type(exc), 400) if refused else 500
        what = type(exc).__name__
        if refused:
            self.log.info("refused what is no HTTP request of ours: %s", what)
        else:
            self.log.error("error handling a request", exc_info=exc)
        error = GatewayError(f"The request can't be served: {what}.", status=status, code=_CODE)
        line, headers, body = errors.response(error, _UNKNOWN_PATH, "")
        headers += [("Connection", "close"), ("X-Request-Id", name_request({}))]
        head = "".join(f"{name}: {value}\r\n" for name, value in headers)
        with suppress(OSError), gevent.Timeout(1, False):
            client.sendall(f"HTTP/1.1 {line}\r\n{head}\r\n".encode("latin-1") + body)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM: accept no more; event streams end now, inference streams may finish."""
        super().handle_exit(sig, frame)
        if self.booted:
            # in a greenlet: a signal handler must not take locks
            gevent.spawn(self._drain)

    def _drain(self) -> None:
        waiting = set(self._idle)
        self.wsgi.extensions["gateway"].drain()
        # A client that is about to send its next request gets it answered, with Connection: close.
        gevent.sleep(IDLE_AT_END)
        for idle in waiting & self._idle:
            idle.end()
        gevent.sleep(max(0.0, self.cfg.graceful_timeout - IDLE_AT_END - LAST_WORDS))
        self.wsgi.extensions["gateway"].proxy.cut_all()


class _InvitedBody:
    """A request body whose client waits for ``100 Continue``."""

    def __init__(self, body: Any, sock: Any) -> None:
        self._body = body
        self._socket = sock
        self.invited = False

    def read(self, size: int | None = None) -> bytes:
        if not self.invited:
            self.invited = True
            self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        data: bytes = self._body.read(size)
        return data


class _Idle:
    """Waiting for a request on one connection, for a limited time."""

    def __init__(self, timeout: float, everybody: set[_Idle]) -> None:
        self._timeout = gevent.Timeout(timeout, False)
        self._everybody = everybody
        self._greenlet: Any = None

    def __enter__(self) -> None:
        self._greenlet = gevent.getcurrent()
        self._everybody.add(self)
        self._timeout.start()

    def __exit__(self, kind: Any, fault: Any, trace: Any) -> bool:
        self._timeout.close()
        self._everybody.discard(self)
        return fault is self._timeout

    def end(self) -> None:
        """Let the time be over now."""
        gevent.kill(self._greenlet, self._timeout)


def on_starting(server: Any) -> None:
    """Make the directory of the metrics' counter files, and remove those of masters that died
    without cleaning up."""
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{_METRICS_PREFIX}*"):
        pid = left.name.removeprefix(_METRICS_PREFIX).partition("-")[0]
        if pid.isdigit() and Path("/proc/self").exists() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    os.environ[METRICS_VARIABLE] = tempfile.mkdtemp(prefix=f"{_METRICS_PREFIX}{os.getpid()}-")


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
