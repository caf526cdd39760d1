"""Notices that a client disconnects while its request waits for LM Studio.

Nothing reads or writes the client's socket during that time, so the event loop watches it: if it
becomes readable and reading yields the end of the stream, the client has disconnected. A client
that closes only its sending half (``shutdown(SHUT_WR)``) looks the same on the wire; like nginx,
Go's net/http and most HTTP/1.1 servers, the gateway treats it as disconnected.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

import gevent
import gevent.monkey

from gateway.errors import GatewayError
from gateway.lmstudio import sockets

#: The key of the client's socket in the environ, where the WSGI server puts it.
SOCKET = "gateway.socket"
#: The environ key that the WSGI server sets to True when it has handed the last byte of the
#: response to the kernel.
DELIVERED = "gateway.delivered"
#: Seconds between two checks of a client that has sent more than its request (pipelining): the
#: unread data hides the end of the stream from MSG_PEEK, but not from poll(2).
PIPELINED_INTERVAL = 0.25

#: libev's event mask for a readable socket.
_READ = 1
_PEER_CLOSED = getattr(select, "POLLRDHUP", 0)


class ClientDisconnected(GatewayError):
    """The client disconnected before it got a response, so nobody reads this error."""

    status, code = 499, "client_closed_request"


class ClientWatch:
    """Calls ``on_disconnect`` once, from the event loop, when the client disconnects."""

    def __init__(self, client: Any, on_disconnect: Callable[[], None]) -> None:
        self.disconnected = False
        self._on_disconnect = on_disconnect
        self._client = client
        self._watcher: Any = None
        self._timer: Any = None
        self._start()

    def restart(self) -> None:
        """Watch the socket itself again, if what the client had sent hid the end of the stream and
        has been read meanwhile."""
        if self._timer is not None:
            self.stop()
            self._start()

    def _start(self) -> None:
        self._watcher = gevent.get_hub().loop.io(self._client.fileno(), _READ)
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
        """Runs in the event loop and must not block."""
        data = sockets.peek(self._client)
        if data is None:
            return
        if data:
            self._watcher.close()
            self._watcher = None
            loop = gevent.get_hub().loop
            self._timer = loop.timer(PIPELINED_INTERVAL, repeat=PIPELINED_INTERVAL)
            self._timer.start(self._check_pipelined)
            return
        self._disconnected()

    def _check_pipelined(self) -> None:
        if _has_closed(self._client):
            self._disconnected()

    def _disconnected(self) -> None:
        self.stop()
        self.disconnected = True
        self._on_disconnect()


def watch(environ: dict[str, Any], on_disconnect: Callable[[], None]) -> ClientWatch | None:
    """Watch the client of a request; None if the WSGI server does not expose its socket."""
    client = environ.get(SOCKET)
    return None if client is None else ClientWatch(client, on_disconnect)


def has_disconnected(environ: dict[str, Any]) -> bool:
    """Whether the client of a request has disconnected by now."""
    client = environ.get(SOCKET)
    return client is not None and (sockets.peek(client) == b"" or _has_closed(client))


def is_delivered(environ: dict[str, Any]) -> bool:
    """Whether the client was sent the whole response, as far as the WSGI server tells."""
    return bool(environ.get(DELIVERED, SOCKET not in environ))


def _has_closed(client: Any) -> bool:
    """Whether the peer has closed its side behind data that is still unread.

    Linux reports that, other systems report at most a reset connection, and Windows nothing.
    """
    try:
        poll = gevent.monkey.get_original("select", "poll")()
    except AttributeError:
        return False
    # POLLHUP and POLLERR are always reported
    poll.register(client.fileno(), _PEER_CLOSED)
    return bool(poll.poll(0))
