"""One exchange, from the client's request to the body of its response.

Serves ``/v1/*``, the shorthand paths and ``/api/*`` once access has been granted: resolves the
target, injects, sends, and starts to relay. :meth:`Proxy.exchange` works on the WSGI environ, so
that the busiest paths need no Flask.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gateway import errors
from gateway.clock import remaining
from gateway.errors import BadGateway, GatewayError, Headers, UpstreamTimeout
from gateway.lmstudio import ConnectionBroken, Exchange, ReadTimeout, Upstream
from gateway.observe import Record, Reporter
from gateway.proxy import injection, relay, repair
from gateway.proxy.usage import Tap
from gateway.request import (
    CLIENT,
    REQUEST_ID,
    Access,
    ClientDisconnected,
    bodies,
    cancellation,
    headers,
    upstream_target,
)
from gateway.settings import Settings
from gateway.sse import HEARTBEAT
from gateway.state import SharedStore

Environ = dict[str, Any]

#: Set in the environ of a request that the access log records as an exchange.
RECORDED = "gateway.recorded"
#: Exchanges that one worker runs at a time; well below its limit of connections, so that /health
#: and /admin still get theirs.
MAX_EXCHANGES = 2048


@dataclass
class ProxyResponse:
    """The client's response, complete but for ``X-Request-Id`` and CORS headers."""

    status: str
    headers: Headers
    body: Iterable[bytes]


class Overloaded(GatewayError):
    """The worker is at its limit of exchanges. A worker queues nothing: the backlog of the
    listening socket bounds how many requests wait."""

    status, code = 503, "overloaded"
    headers = [("Retry-After", "1")]


class Proxy:
    """The proxy of one worker."""

    def __init__(
        self,
        settings: Settings,
        access: Access,
        store: SharedStore,
        upstream: Upstream,
        reporter: Reporter,
    ) -> None:
        self._access = access
        self._store = store
        self._upstream = upstream
        self._reporter = reporter
        self._max_body_bytes = settings.max_body_bytes
        self._timeout = settings.proxy_timeout
        self._stream_timeout = settings.proxy_stream_timeout
        self._in_flight: set[Exchange] = set()

    def exchange(self, environ: Environ) -> ProxyResponse:
        """Serve one request; raises a GatewayError if there is nothing to relay."""
        path, target = upstream_target(environ)
        record = Record(
            request_id=environ[REQUEST_ID],
            client=environ.get(CLIENT, ""),
            method=environ["REQUEST_METHOD"],
            path=path,
        )
        try:
            body, added_usage = self._prepare(environ, record)
            exchange = self._send(environ, target, body, added_usage)
            record.upstream_sent = time.monotonic()
            return self._respond(environ, exchange, Tap(remove_usage=added_usage), record)
        except Exception as error:
            record.status = error.status if isinstance(error, GatewayError) else 500
            record.fail(str(error))
            record.finish(cancelled=isinstance(error, ClientDisconnected))
            raise

    def abort_all(self) -> None:
        """Abort every exchange in flight, when the worker's grace period is over."""
        for exchange in list(self._in_flight):
            exchange.abort("The gateway is shutting down.")

    def _prepare(self, environ: Environ, record: Record) -> tuple[bodies.Body, bool]:
        """Return the body to send upstream, with injected fields where the endpoint has any, and
        whether the gateway added the request for the stream's usage.

        Records the start of the exchange, even when the body is rejected.
        """
        endpoint = injection.ENDPOINTS.get(record.path) if record.method == "POST" else None
        try:
            if endpoint is None or environ.get("HTTP_CONTENT_ENCODING"):
                return bodies.stream_body(environ, self._max_body_bytes), False
            content = bodies.read_body(environ, self._max_body_bytes)
            prepared = injection.prepare(endpoint, content, self._store.active)
            record.requested_model = prepared.requested_model or ""
            record.model = prepared.model
            record.stream = prepared.stream
            return prepared.body, prepared.added_usage
        finally:
            if not record.path.startswith("/api/"):
                environ[RECORDED] = True
                self._reporter.begin(record)

    def _send(
        self, environ: Environ, target: str, body: bodies.Body, added_usage: bool
    ) -> Exchange:
        """Send the request to LM Studio without waiting for its response."""
        if len(self._in_flight) >= MAX_EXCHANGES:
            raise Overloaded("The gateway is busy with other requests; try again.")
        request_headers = headers.to_upstream(
            environ,
            body,
            self._upstream.authority,
            self._upstream.authorization,
            trusted=self._access.trusts_peer(environ),
        )
        request_headers["X-Request-Id"] = environ[REQUEST_ID]
        if added_usage:
            # a compressed stream would hide the usage chunk that has to be removed
            request_headers["Accept-Encoding"] = "identity"
        method = environ["REQUEST_METHOD"]
        try:
            exchange = self._upstream.send(method, target, request_headers, body)
        except ConnectionBroken as fault:
            raise _bad_gateway(fault) from None
        self._in_flight.add(exchange)
        exchange.on_close = self._in_flight.discard
        return exchange

    def _respond(
        self, environ: Environ, exchange: Exchange, tap: Tap, record: Record
    ) -> ProxyResponse:
        """Wait for the response; abort the exchange if the client disconnects meanwhile."""
        watch = cancellation.watch(environ, exchange.abort)
        try:
            dialect = errors.dialect_of(environ["PATH_INFO"])
            status, response_headers, pieces = self._relay(exchange, tap, record, dialect)
        except BaseException as fault:
            if watch is not None:
                watch.stop()
            exchange.close()
            if watch is not None and watch.disconnected:
                raise ClientDisconnected("The client closed the connection.") from None
            if isinstance(fault, ConnectionBroken):
                reason = exchange.abort_reason
                raise (Overloaded(reason) if reason else _bad_gateway(fault)) from None
            raise
        body = relay.Relay(pieces, exchange, watch, record)
        return ProxyResponse(status, response_headers, body)

    def _relay(
        self, exchange: Exchange, tap: Tap, record: Record, dialect: str
    ) -> tuple[str, Headers, Iterator[bytes]]:
        """Wait for LM Studio's head and choose how to relay what follows it.

        Returns the client's status line, headers and body.
        """
        deadline = None if self._timeout is None else record.started + self._timeout
        try:
            head = exchange.wait_head(self._head_timeout(record, deadline))
        except ReadTimeout:
            if not record.stream or (self._stream_timeout or HEARTBEAT + 1) <= HEARTBEAT:
                raise UpstreamTimeout("LM Studio did not answer in time.") from None
            record.status = 200
            stream_headers = headers.of_stream(
                [("Content-Type", "text/event-stream; charset=utf-8")]
            )
            pieces = relay.late_stream(exchange, tap, self._stream_timeout, record, dialect)
            return "200 OK", stream_headers, pieces
        record.upstream_head = time.monotonic()
        record.status = head.status
        response_headers = headers.to_client(head.status, head.headers)
        if head.status < 400 and relay.is_event_stream(exchange) and record.method != "HEAD":
            response_headers = headers.of_stream(response_headers)
            pieces = relay.stream(exchange, tap, self._stream_timeout, record, dialect)
        else:
            first = _first_piece(exchange, deadline, dialect)
            pieces = relay.plain(exchange, first, deadline, record)
        return f"{head.status} {head.reason}".rstrip(), response_headers, pieces

    def _head_timeout(self, record: Record, deadline: float | None) -> float | None:
        """Seconds to wait for the head before the gateway responds by itself: with an error, or
        with the first comment of a stream."""
        if not record.stream:
            return remaining(deadline)
        return min(HEARTBEAT, self._stream_timeout or HEARTBEAT)


def _first_piece(exchange: Exchange, deadline: float | None, dialect: str) -> bytes:
    """Read the beginning of a plain response.

    Raises the error that an upstream error body holds, or that LM Studio put into a 200.
    """
    if exchange.complete:
        return b""
    try:
        first = exchange.receive(remaining(deadline))
    except ReadTimeout:
        raise UpstreamTimeout("LM Studio did not answer in time.") from None
    status = exchange.head.status
    encoding = exchange.head.get("content-encoding")
    error = None
    if status >= 400:
        first += relay.collect(exchange, remaining(deadline))
        error = repair.wrapped_error(status, first, encoding, dialect)
    elif status == 200:
        if encoding is None and repair.starts_like_error(first):
            first += relay.collect(exchange, remaining(deadline))
        if exchange.complete and len(first) <= repair.MAX_ERROR_BYTES:
            error = repair.embedded_error(first, encoding)
    if error is not None:
        error.headers = headers.with_error(exchange.head.headers, error)
        raise error
    return first


def _bad_gateway(fault: ConnectionBroken) -> BadGateway:
    return BadGateway(f"LM Studio broke off the exchange: {fault}.")
