"""A long operation, run beside the request that started it."""

from __future__ import annotations

import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.event

from gateway import sse
from gateway.admin.models import Emit
from gateway.clock import timestamp
from gateway.errors import GatewayError, InternalError, dumps
from gateway.request import REQUEST_ID, ClientDisconnected, cancellation
from gateway.sse import HEARTBEAT, KEEP_ALIVE

Event = tuple[str, dict[str, Any]]

logger = logging.getLogger(__name__)


class Events:
    """The events that wait for the client to read them: of progress at most the newest."""

    def __init__(self) -> None:
        self._waiting: deque[Event] = deque()
        self._arrived = gevent.event.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, event: Event) -> None:
        """Add an event; progress replaces progress that waits."""
        if self._waiting and event[0].endswith("_progress") and self._waiting[-1][0] == event[0]:
            self._waiting.pop()
        self._waiting.append(event)
        self._arrived.set()

    def get(self, timeout: float | None) -> Event | None:
        """Wait for an event and take it; returns None after ``timeout`` seconds without one."""
        if not self._waiting:
            self._arrived.clear()
            if not self._arrived.wait(timeout):
                return None
        return self._waiting.popleft()


class Operation:
    """Work in a greenlet of its own, which is undone unless the client gets the whole response.

    ``work`` gets a function that emits its events and returns the response body; killing its
    greenlet must stop it. ``undo`` gets that body if the client disconnects after the work is done.
    ``publish`` passes each event on to the readers of the event stream.
    """

    _END: Event = ("", {})

    def __init__(
        self,
        environ: dict[str, Any],
        work: Callable[[Emit], dict[str, Any]],
        undo: Callable[[dict[str, Any]], None],
        publish: Emit,
        running: set[Operation],
    ) -> None:
        self._environ = environ
        self._undo = undo
        self._publish = publish
        #: The operations of this worker, for its end.
        self._running = running
        self._events = Events()
        self._result: dict[str, Any] | None = None
        self._error: GatewayError | None = None
        self._closed = False
        running.add(self)
        self._watch = cancellation.watch(environ, self._disconnected)
        self._worker = gevent.spawn(self._run, work)

    def result(self) -> Body:
        """Wait for the work and return the JSON response; raises whatever the work raised."""
        try:
            while self._events.get(None) is not self._END:
                pass
            if self._error is not None:
                raise self._error
        except BaseException:
            self.close()
            raise
        content = dumps(self._result)
        return Body(self, self._last(content), len(content))

    def events(self) -> Body:
        """The events as an SSE body, which ends with the completion or an ``error`` event."""
        return Body(self, self._stream())

    def abort(self, reason: str) -> None:
        """Stop the work, and report the reason to the client."""
        self._stop(GatewayError(reason, status=503, code="overloaded"))

    def close(self) -> None:
        """Stop or undo the work, unless the client has got the whole response. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._running.discard(self)
        if self._watch is not None:
            self._watch.stop()
        self._worker.kill(block=False)  # does nothing if the work has finished
        told = self._error is None and cancellation.is_delivered(self._environ)
        if self._result is not None and not told:
            gevent.spawn(self._undo, self._result)

    def _run(self, work: Callable[[Emit], dict[str, Any]]) -> None:
        completed: list[Event] = []

        def emit(event: str, data: dict[str, Any]) -> None:
            self._publish(event, data)
            # held back until the result is known, because the completion carries its fields
            (completed.append if event.endswith("_complete") else self._events.put)((event, data))

        try:
            self._result = work(emit)
        except GatewayError as error:
            self._error = self._error or error
        except gevent.GreenletExit:
            self._error = self._error or ClientDisconnected("The client closed the connection.")
        except Exception as fault:
            logger.error("unexpected error: %s", self._environ["PATH_INFO"], exc_info=fault)
            self._error = InternalError()
        for event in completed:
            self._events.put(event)
        self._events.put(self._END)
        if self._closed and self._result is not None:
            self._undo(self._result)

    def _disconnected(self) -> None:
        """Runs in the event loop and must not block."""
        self._stop(ClientDisconnected("The client closed the connection."))

    def _stop(self, error: GatewayError) -> None:
        if self._result is None:
            self._error = self._error or error
            self._worker.kill(block=False)
            # a greenlet that is killed before it runs ends without a word
            self._events.put(self._END)

    def _stream(self) -> Iterator[bytes]:
        yield b""  # sends the head before the first event
        while True:
            event = self._events.get(HEARTBEAT)
            if event is None:
                yield KEEP_ALIVE
                continue
            name, data = event
            if name.endswith("_complete"):
                yield from self._last(_event(name, {**(self._result or {}), **data}))
            elif name.endswith("_progress"):
                yield _event(name, data)
            elif not name:
                break
        if self._error is not None:
            yield _event("error", self._failure(self._error))

    def _last(self, piece: bytes) -> Iterator[bytes]:
        """The piece that completes the response, unless the client has disconnected before."""
        if cancellation.has_disconnected(self._environ):
            raise ConnectionResetError(errno.ECONNRESET, "the client has disconnected")
        yield piece

    def _failure(self, error: GatewayError) -> dict[str, Any]:
        request_id = self._environ[REQUEST_ID]
        fields = {"error": error.message, "status": error.status, "requestId": request_id}
        return fields | ({"details": error.details} if error.details else {})


class Body(Iterator[bytes]):
    """The body of an operation's response. The WSGI server closes it, and so the operation."""

    def __init__(
        self, operation: Operation, pieces: Iterator[bytes], length: int | None = None
    ) -> None:
        self._operation = operation
        #: In bytes, where it is known.
        self.length = length
        self._pieces = pieces

    def __next__(self) -> bytes:
        return next(self._pieces)

    def close(self) -> None:
        self._operation.close()


def _event(name: str, data: dict[str, Any]) -> bytes:
    return sse.event(name, dumps({"timestamp": timestamp(time.time()), **data}))
