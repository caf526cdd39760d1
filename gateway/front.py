"""What every request passes through on its way in and out.

:class:`Front` is the WSGI application that the server calls. It admits the request, passes it to
Flask and adds the headers that every response has. Flask's dispatch costs more than the gateway's
own work on an inference request, so the busiest paths skip Flask and go straight to the proxy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from gateway import errors
from gateway.errors import GatewayError, Headers, InternalError, MethodNotAllowed, NotFound
from gateway.observe import AccessLog, Metrics, milliseconds
from gateway.proxy import ENDPOINTS, RECORDED, Proxy
from gateway.request import CLIENT, REQUEST_ID, Access, bodies, normalize, request_id_of

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
WsgiApp = Callable[[Environ, Any], Iterable[bytes]]

#: The environ key of the arrival time of the request (time.monotonic()).
ARRIVED = "gateway.arrived"
#: The paths with an injection rule, and their shorthands: the busiest ones.
HOT_PATHS = frozenset({*ENDPOINTS, *(path.removeprefix("/v1") for path in ENDPOINTS)})
#: Methods that no path takes: TRACE would return the request to LM Studio, API token included, and
#: the gateway is no tunnel.
_NEVER_ALLOWED = frozenset({"TRACE", "CONNECT"})

logger = logging.getLogger(__name__)


class Front:
    """Wraps ``flask``, the WSGI application of Flask itself."""

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
        self._metrics = metrics
        self._log = log
        self.configure(access, max_body_bytes)

    def configure(self, access: Access, max_body_bytes: int) -> None:
        """Take other settings, which count from the next request on."""
        self._access = access
        self._max_body_bytes = max_body_bytes

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        def start(status: str, headers: Headers, *exc_info: Any) -> Any:
            more = self._finish(environ, status, headers)
            return start_response(status, headers + more, *exc_info)

        body: Iterable[bytes]
        try:
            if self._admit(environ):
                status, headers, body = "204 No Content", [], []
            elif environ["PATH_INFO"] in self.hot_paths:
                response = self._proxy.exchange(environ)
                status, headers, body = response.status, response.headers, response.body
            else:
                return self._flask(environ, start)
        except GatewayError as error:
            status, headers, body = error_response(environ, error)
        except Exception as fault:
            status, headers, body = error_response(environ, unexpected(environ, fault))
        start(status, headers)
        return body

    def _admit(self, environ: Environ) -> bool:
        """Normalize the path, then check access, method and ``Content-Length``, before any of the
        body is read.

        Returns whether the request is a CORS preflight, which gets a 204. Raises a GatewayError if
        the request is rejected.
        """
        environ[ARRIVED] = time.monotonic()
        environ["PATH_INFO"] = normalize(environ["PATH_INFO"])
        try:
            preflight = self._access.admit(environ)
        except GatewayError as error:
            self._metrics.rejected(error.code)
            raise
        if environ["PATH_INFO"].startswith("//"):
            raise NotFound(f"Unknown path: {environ['PATH_INFO']}")
        if environ["REQUEST_METHOD"] in _NEVER_ALLOWED:
            raise MethodNotAllowed(environ["REQUEST_METHOD"])
        bodies.check_length(environ, self._max_body_bytes)
        return preflight

    def _finish(self, environ: Environ, status: str, headers: Headers) -> Headers:
        """Log the request, unless its exchange does; return the headers that every response has."""
        request_id = request_id_of(environ)
        if RECORDED not in environ:
            self._log.log_request(_log_entry(environ, int(status[:3]), headers))
        return [("X-Request-Id", request_id), *self._access.cors_headers(environ)]


def error_response(environ: Environ, error: GatewayError) -> tuple[str, Headers, list[bytes]]:
    """Status line, headers and body of an error, in the dialect of the request's path."""
    request_id = request_id_of(environ)
    path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
    status, headers, body = errors.response(error, path, request_id, method=method)
    return status, headers, [body]


def unexpected(environ: Environ, fault: Exception) -> GatewayError:
    """Log a bug of the gateway. Returns an error for the client that reveals nothing about it."""
    where = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']!r}"
    logger.error("unexpected error: %s", where, exc_info=fault)
    return InternalError()


def _log_entry(environ: Environ, status: int, headers: Headers) -> dict[str, Any]:
    """The access log's entry for a request that is not an exchange; an exchange logs its own."""
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
