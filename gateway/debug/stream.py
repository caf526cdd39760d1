"""The body of ``GET /debug/stream``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gateway.lmstudio import sockets
from gateway.observe import Metrics, Subscription
from gateway.request import cancellation
from gateway.sse import KEEP_ALIVE


class EventStream(Iterator[bytes]):
    """The frames of a subscription, and SSE comments while nothing happens.

    It is in ``streams`` until it is closed.
    """

    def __init__(
        self,
        frames: Subscription,
        environ: dict[str, Any],
        metrics: Metrics,
        streams: set[EventStream],
    ) -> None:
        self._frames = frames
        self._watch = cancellation.watch(environ, frames.end)
        self._client = environ.get(cancellation.SOCKET)
        self._metrics = metrics
        self._open = True
        metrics.subscribers.inc()
        self._streams = streams
        streams.add(self)

    def __next__(self) -> bytes:
        frame = next(self._frames)
        return KEEP_ALIVE if frame is None else frame

    def cut(self) -> None:
        """Close the reader's connection, in case it does not read: a blocked write ends then."""
        if self._client is not None:
            sockets.shut(self._client)

    def close(self) -> None:
        """Free the reader's place among the subscribers. Idempotent."""
        if self._open:
            self._open = False
            self._streams.discard(self)
            self._metrics.subscribers.dec()
            self._frames.close()
            if self._watch is not None:
                self._watch.stop()
