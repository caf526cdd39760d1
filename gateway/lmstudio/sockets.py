"""Calls on the plain socket beneath gevent and TLS, which never wait."""

from __future__ import annotations

import socket
from typing import Any

import gevent.monkey

_PlainSocket = gevent.monkey.get_original("socket", "socket")
#: Windows lacks MSG_DONTWAIT; gevent's sockets never block there anyway.
_PEEK = socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0)


def peek(sock: Any) -> bytes | None:
    """Return the next byte without consuming it.

    ``b""`` is the end of the stream or a failed connection, None means that nothing has arrived.
    """
    plain = _borrow(sock)
    try:
        return bytes(plain.recv(1, _PEEK))
    except BlockingIOError:
        return None
    except OSError:
        return b""
    finally:
        plain.detach()


def shut(sock: Any) -> None:
    """Shut down both directions; whoever waits for the socket sees the end of the stream."""
    plain = _borrow(sock)
    try:
        plain.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    finally:
        plain.detach()


def _borrow(sock: Any) -> socket.socket:
    """The same file descriptor as a plain socket, which the caller must detach and never close.

    The address family does not matter for these calls, so it isn't looked up.
    """
    plain: socket.socket = _PlainSocket(socket.AF_INET, socket.SOCK_STREAM, 0, sock.fileno())
    return plain
