"""Noticing that a client has left, while its request waits for LM Studio.

Nobody reads or writes the client's socket during that time, so the event loop watches it: when it
becomes readable and what there is to read is the end, the client has gone. A client that closes
only its sending half (``shutdown(SHUT_WR)``) looks the same on the wire; like nginx, Go's net/http
and most HTTP/1.1 servers the gateway takes it for gone.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

import gevent
import gevent.monkey

from gateway import sockets
from gateway.errors import GatewayError

_READ = 1

#: Seconds between two looks at a client that has sent more than its request (pipelining): the data
#: in front hides the end from MSG_PEEK, but not from poll(2).
PIPELINED_INTERVAL = 0.25
_PEER_CLOSED = getattr(select, "POLLRDHUP", 0)


#: Where the WSGI server keeps the client's socket in the environ.
SOCKET = "gateway.socket"


class ClientGone(GatewayError):
    """The client disconnected before there was anything to answer; nobody reads this."""

    status, code = 499, "client_closed_request"


class ClientWatch:
    """Calls ``on_gone`` once, from the event loop, when the client has left."""

    def __init__(self, client: Any, on_gone: Callable[[], None]) -> None:
        self.gone = False
        self._on_gone = on_gone
        self._client = client
        loop = gevent.get_hub().loop
        self._watcher = loop.io(client.fileno(), _READ)
        self._timer: Any = None
        self._watcher.start(self._readable)

    def stop(self) -> None:
        """Stop watching. Idempotent."""
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def _readable(self) -> None:
        """In the event loop: must not block."""
        waiting = sockets.peek(self._client)
        if waiting is None:
            return
        if waiting:
            self._watcher.close()
            self._watcher = None
            loop = gevent.get_hub().loop
            self._timer = loop.timer(PIPELINED_INTERVAL, repeat=PIPELINED_INTERVAL)
            self._timer.start(self._look_behind)
            return
        self._left()

    def _look_behind(self) -> None:
        if _has_closed(self._client):
            self._left()

    def _left(self) -> None:
        self.stop()
        self.gone = True
        self._on_gone()


def watch(environ: dict[str, Any], on_gone: Callable[[], None]) -> ClientWatch | None:
    """Watch the client of a request; None where the WSGI server does not tell its socket."""
    client = environ.get(SOCKET)
    return None if client is None else ClientWatch(client, on_gone)


def _has_closed(client: Any) -> bool:
    """Whether the peer's end has come behind data that nobody has read yet (Linux tells it, others
    at most when the connection was reset, Windows never)."""
    try:
        poll = gevent.monkey.get_original("select", "poll")()
    except AttributeError:
        return False
    # POLLHUP and POLLERR are told unasked
    poll.register(client.fileno(), _PEER_CLOSED)
    return bool(poll.poll(0))
