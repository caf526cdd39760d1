"""What every request passes on its way in and out.

:class:`Front` is the WSGI application that the server calls. It admits the request, hands it to
Flask and adds the headers that every response has. Flask's dispatch costs more than the gateway's
own work on an inference request, so the busiest paths go straight to the proxy instead.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from gateway import errors
from gateway.errors import GatewayError, Headers, NotFound
from gateway.observe import AccessLog, Metrics, milliseconds
from gateway.proxy import RECORDED, TABLE, Proxy
from gateway.request import CLIENT, REQUEST_ID, Access, bodies, name_request

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
WsgiApp = Callable[[Environ, Any], Iterable[bytes]]

#: Where the time of a request's arrival (time.monotonic()) is kept in the environ.
ARRIVED = "gateway.arrived"
#: The paths with an injection rule and their shorthands: those that applications call all day.
HOT_PATHS = frozenset({*TABLE, *(path.removeprefix("/v1") for path in TABLE)})

logger = logging.getLogger(__name__)


class Front:
    """The way in and out of one gateway, around ``flask``, Flask's own WSGI application."""

    #: The paths that Flask does not dispatch.
    hot_paths = HOT_PATHS

    def __init__(
        self,
        flask: WsgiApp,
        proxy: Proxy,
        access: Access,
        metrics: Metrics,
        log: AccessLog,
        max_body_bytes: int,
    ) -> None:
        self._flask = flask
        self._proxy = proxy
        self._access = access
        self._metrics = metrics
        self._log = log
        self._max_body_bytes = max_body_bytes

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        def start(status: str, headers: Headers, *exc_info: Any) -> Any:
            complete = headers + self._leave(environ, status, headers)
            return start_response(status, complete, *exc_info)

        body: Iterable[bytes]
        try:
            if self._enter(environ):
                status, headers, body = "204 No Content", [], []
            elif environ["PATH_INFO"] in self.hot_paths:
                answer = self._proxy.exchange(environ)
                status, headers, body = answer.status, answer.headers, answer.body
            else:
                return self._flask(environ, start)
        except GatewayError as error:
            status, headers, body = error_response(environ, error)
        except Exception as fault:
            status, headers, body = error_response(environ, unexpected(environ, fault))
        start(status, headers)
        return body

    def _enter(self, environ: Environ) -> bool:
        """Check access first, then the announced size of the body, before a byte of it is read.

        Raises a GatewayError; returns whether this is a CORS preflight, to be answered 204.
        """
        environ[ARRIVED] = time.monotonic()
        try:
            preflight = self._access.admit(environ)
        except GatewayError as error:
            self._metrics.rejected(error.code)
            raise
        if environ["PATH_INFO"].startswith("//"):
            raise NotFound(f"Unknown path: {environ['PATH_INFO']}")
        bodies.check_length(environ, self._max_body_bytes)
        return preflight

    def _leave(self, environ: Environ, status: str, headers: Headers) -> Headers:
        """Log a request that is no exchange; returns the headers that every response gets."""
        request_id = environ.get(REQUEST_ID) or name_request(environ)
        if RECORDED not in environ:
            self._log.log_request(_log_entry(environ, int(status[:3]), headers))
        return [("X-Request-Id", request_id), *self._access.cors_headers(environ)]


def error_response(environ: Environ, error: GatewayError) -> tuple[str, Headers, list[bytes]]:
    """Status line, headers and body of an error, in the dialect of the request's path."""
    request_id = environ.get(REQUEST_ID) or name_request(environ)
    path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
    status, headers, body = errors.response(error, path, request_id, method=method)
    return status, headers, [body]


def unexpected(environ: Environ, fault: Exception) -> GatewayError:
    """Log a bug of the gateway's own; the client learns only that there was one."""
    where = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']!r}"
    logger.error("unexpected error: %s", where, exc_info=fault)
    return GatewayError("The gateway failed; its log says more.")


def _log_entry(environ: Environ, status: int, headers: Headers) -> dict[str, Any]:
    """The access log's entry for a request that is no exchange (exchanges log their own)."""
    arrived = environ.get(ARRIVED) or time.monotonic()
    size = next((int(value) for name, value in headers if name.lower() == "content-length"), None)
    return {
        "requestId": environ[REQUEST_ID],
        "client": environ.get(CLIENT, ""),
        "method": environ["REQUEST_METHOD"],
        "path": environ["PATH_INFO"].encode("latin-1").decode("utf-8", "replace"),
        "status": status,
        "bytes": size,
        "totalMs": milliseconds(time.monotonic() - arrived),
    }
