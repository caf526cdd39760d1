"""What every request passes on its way in and out, whether Flask dispatches it or not.

Flask's dispatch costs more than the gateway's own work on an inference request, so the busiest
paths are served in front of it (:class:`HotPath`); access, limits, errors, headers and the access
log are the same code for both ways.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from gateway import errors
from gateway.access import CLIENT, REQUEST_ID, Access, name_request
from gateway.accounts import AccessLog
from gateway.bodies import check_length
from gateway.errors import GatewayError, Headers, NotFound
from gateway.injection import TABLE
from gateway.metrics import Metrics
from gateway.proxy import RECORDED, Proxy
from gateway.record import milliseconds

Environ = dict[str, Any]
StartResponse = Callable[[str, Headers], Any]
WsgiApp = Callable[[Environ, Any], Iterable[bytes]]

#: Where the moment of a request's arrival (time.monotonic()) is kept in the environ.
ARRIVED = "gateway.arrived"
#: The paths with an injection rule and their shorthands: those that applications call all day.
HOT_PATHS = frozenset({*TABLE, *(path.removeprefix("/v1") for path in TABLE)})

logger = logging.getLogger(__name__)


class Front:
    """The way in and out of one gateway."""

    def __init__(
        self, access: Access, metrics: Metrics, log: AccessLog, max_body_bytes: int
    ) -> None:
        self._access = access
        self._metrics = metrics
        self._log = log
        self._max_body_bytes = max_body_bytes

    def enter(self, environ: Environ) -> bool:
        """Access first, then the announced size of the body; both before a byte of it is read.

        Raises a GatewayError; returns whether this is a CORS preflight, to be answered 204.
        """
        environ[ARRIVED] = time.monotonic()
        try:
            preflight = self._access.admit(environ)
        except GatewayError as error:
            self._metrics.turned_away(error.code)
            raise
        if environ["PATH_INFO"].startswith("//"):
            raise NotFound(f"Unknown path: {environ['PATH_INFO']}")
        check_length(environ, self._max_body_bytes)
        return preflight

    def leave(self, environ: Environ, status: int, size: int | None) -> Headers:
        """The headers that every answer gets; tells the access log of what is no exchange."""
        request_id = environ.get(REQUEST_ID) or name_request(environ)
        if RECORDED not in environ:
            self._log.request(_log_entry(environ, status, size))
        return [("X-Request-Id", request_id), *self._access.cors_headers(environ)]


class HotPath:
    """A WSGI application that serves the busiest paths itself and leaves the others to Flask."""

    def __init__(self, flask: WsgiApp, front: Front, proxy: Proxy) -> None:
        self._flask = flask
        self._front = front
        self._proxy = proxy

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] not in HOT_PATHS:
            return self._flask(environ, start_response)
        body: Iterable[bytes]
        try:
            if self._front.enter(environ):
                status, headers, body = "204 No Content", [], []
            else:
                answer = self._proxy.exchange(environ)
                status, headers, body = answer.status, answer.headers, answer.body
        except GatewayError as error:
            status, headers, body = error_response(environ, error)
        except Exception as fault:
            status, headers, body = error_response(environ, unexpected(environ, fault))
        headers = headers + self._front.leave(environ, int(status[:3]), None)
        start_response(status, headers)
        return body


def error_response(environ: Environ, error: GatewayError) -> tuple[str, Headers, list[bytes]]:
    """An error in the dialect of the request's path."""
    request_id = environ.get(REQUEST_ID) or name_request(environ)
    path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
    status, headers, body = errors.response(error, path, request_id, method=method)
    return status, headers, [body]


def unexpected(environ: Environ, fault: Exception) -> GatewayError:
    """A bug of ours: told in the log, not to the client."""
    where = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']!r}"
    logger.error("unexpected error: %s", where, exc_info=fault)
    return GatewayError("The gateway failed; its log says more.")


def _log_entry(environ: Environ, status: int, size: int | None) -> dict[str, Any]:
    """The access log's line of a request that is no inference exchange (those log their own)."""
    began = environ.get(ARRIVED) or time.monotonic()
    return {
        "requestId": environ[REQUEST_ID],
        "client": environ.get(CLIENT, ""),
        "method": environ["REQUEST_METHOD"],
        "path": environ["PATH_INFO"].encode("latin-1").decode("utf-8", "replace"),
        "status": status,
        "bytes": size,
        "totalMs": milliseconds(time.monotonic() - began),
    }
