"""A long operation, run beside the request that started it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.event

from gateway import sse
from gateway.admin.models import Emit
from gateway.clock import timestamp
from gateway.errors import GatewayError, dumps
from gateway.request import ClientDisconnected, cancellation
from gateway.sse import HEARTBEAT, KEEP_ALIVE

Event = tuple[str, dict[str, Any]]


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
    """Work in a greenlet of its own, which stops when the client disconnects.

    ``work`` gets a function that emits its events and returns the response body; ``publish`` passes
    each event on to the readers of the event stream.
    """

    _DISCONNECTED: Event = ("disconnected", {})

    def __init__(self, work: Callable[[Emit], Any], publish: Emit) -> None:
        self._publish = publish
        self._events = Events()
        self._result: dict[str, Any] = {}
        self._error: BaseException | None = None
        self._worker = gevent.spawn(self._run, work)

    def result(self, environ: dict[str, Any]) -> dict[str, Any]:
        """Wait for the work and return the response body; raises whatever the work raised."""
        for _ in self._until_end(environ):
            pass
        return self._result

    def events(self, environ: dict[str, Any], request_id: str) -> Iterator[bytes]:
        """The events as an SSE body, which ends with the completion or an ``error`` event."""
        yield b""  # sends the head before the first event
        try:
            for event in self._until_end(environ, HEARTBEAT):
                if event is None:
                    yield KEEP_ALIVE
                elif event[0].endswith(("_progress", "_complete")):
                    result = self._result if event[0].endswith("_complete") else {}
                    yield _event(event[0], {**result, **event[1]})
        except ClientDisconnected:
            return
        except GatewayError as error:
            fields = {"error": error.message, "status": error.status, "requestId": request_id}
            if error.details:
                fields["details"] = error.details
            yield _event("error", fields)

    def _run(self, work: Callable[[Emit], Any]) -> None:
        completed: list[Event] = []

        def emit(event: str, data: dict[str, Any]) -> None:
            self._publish(event, data)
            # held back until the result is known, because the completion carries its fields
            (completed.append if event.endswith("_complete") else self._events.put)((event, data))

        try:
            self._result = work(emit)
        except GatewayError as error:
            self._error = error
        except gevent.GreenletExit:
            self._error = ClientDisconnected("The client closed the connection.")
        except Exception as error:
            self._error = error
        for event in completed:
            self._events.put(event)
        self._events.put(("end", {}))

    def _until_end(
        self, environ: dict[str, Any], heartbeat: float | None = None
    ) -> Iterator[Event | None]:
        """The events in order, and None after each ``heartbeat`` seconds without one.

        Stops the work and raises ClientDisconnected when the client disconnects.
        """
        watch = cancellation.watch(environ, lambda: self._events.put(self._DISCONNECTED))
        try:
            while True:
                event = self._events.get(heartbeat)
                if event is None:
                    yield None
                    continue
                if event is self._DISCONNECTED:
                    raise ClientDisconnected("The client closed the connection.")
                if event[0] == "end":
                    break
                yield event
            if self._error is not None:
                raise self._error
        finally:
            if watch is not None:
                watch.stop()
            self._worker.kill(block=False)  # does nothing if the work has finished


def _event(name: str, data: dict[str, Any]) -> bytes:
    return sse.event(name, dumps({"timestamp": timestamp(time.time()), **data}))
