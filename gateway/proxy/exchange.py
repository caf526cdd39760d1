"""One exchange, from the client's request to the body of its response.

Serves ``/v1/*``, the shorthand paths and ``/api/*`` once access has been granted: resolves the
target, injects, sends, and starts to relay. :meth:`Proxy.exchange` works on the WSGI environ, so
that the busiest paths need no Flask.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gateway import errors, sse
from gateway.clock import remaining
from gateway.errors import BadGateway, GatewayError, Headers, Overloaded, UpstreamTimeout
from gateway.lmstudio import ConnectionBroken, Exchange, ReadTimeout, Upstream
from gateway.logs import Throttle
from gateway.observe import Record, Reporter
from gateway.proxy import injection, relay, repair
from gateway.proxy.usage import Tap
from gateway.request import (
    CLIENT,
    REQUEST_ID,
    Access,
    Budget,
    ClientDisconnected,
    Share,
    bodies,
    cancellation,
    headers,
    upstream_target,
)
from gateway.settings import Settings
from gateway.sse import HEARTBEAT
from gateway.state import SharedStore

Environ = dict[str, Any]

_throttle = Throttle(logging.getLogger(__name__))

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


class Proxy:
    """The proxy of one worker."""

    def __init__(
        self,
        access: Access,
        settings: Settings,
        store: SharedStore,
        upstream: Upstream,
        reporter: Reporter,
    ) -> None:
        self._store = store
        self._upstream = upstream
        self._reporter = reporter
        self.configure(access, settings)
        self._in_flight: set[Exchange] = set()
        self._budget = Budget()

    def configure(self, access: Access, settings: Settings) -> None:
        """Take other settings, which count from the next exchange on."""
        self._access = access
        self._max_body_bytes = settings.max_body_bytes
        self._timeout = settings.proxy_timeout
        self._stream_timeout = settings.proxy_stream_timeout

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
            exchange, tap = self._open(environ, target, record)
            return self._respond(environ, exchange, tap, record)
        except Exception as error:
            if isinstance(error, Overloaded):
                _throttle.warning(error.message, "a request got 503: %s", error.message)
            record.status, reason = 500, f"unexpected {type(error).__name__}"
            if isinstance(error, GatewayError):
                record.status, reason = error.status, error.report
            record.fail(reason)
            record.finish(cancelled=isinstance(error, ClientDisconnected))
            raise

    def abort_all(self) -> None:
        """Abort every exchange in flight, when the worker's grace period is over."""
        for exchange in list(self._in_flight):
            exchange.abort("The gateway is shutting down.")

    def _open(self, environ: Environ, target: str, record: Record) -> tuple[Exchange, Tap]:
        """Return the exchange, which has not been sent yet, and the tap for its response.

        Only the exchange keeps the request's body, so that the memory is free as soon as the body
        is no longer needed.
        """
        share = self._budget.share()
        try:
            body, added_usage = self._prepare(environ, record, share)
            if len(self._in_flight) >= MAX_EXCHANGES:
                raise Overloaded("The gateway is busy with other requests; try again.")
            method = environ["REQUEST_METHOD"]
            request_headers = self._headers(environ, body, record)
            exchange = self._upstream.exchange(method, target, request_headers, body)
        except BaseException:
            share.release()
            raise
        exchange.on_body_dropped = share.release
        self._in_flight.add(exchange)
        exchange.on_close = self._in_flight.discard
        return exchange, Tap(remove_usage=added_usage)

    def _prepare(self, environ: Environ, record: Record, share: Share) -> tuple[bodies.Body, bool]:
        """Return the body to send upstream, with injected fields where the endpoint has any, and
        whether the gateway added the request for the stream's usage.

        Records the start of the exchange, even when the body is rejected.
        """
        endpoint = _endpoint(record)
        try:
            if endpoint is None or environ.get("HTTP_CONTENT_ENCODING"):
                return bodies.stream_body(environ, self._max_body_bytes), False
            content = bodies.read_body(environ, self._max_body_bytes, share)
            prepared = injection.prepare(endpoint, content, self._store.active)
            record.set_models(prepared.requested_model, prepared.model)
            record.stream = prepared.stream
            return prepared.body, prepared.added_usage
        finally:
            if not record.path.startswith("/api/"):
                environ[RECORDED] = True
                self._reporter.begin(record)

    def _headers(self, environ: Environ, body: bodies.Body, record: Record) -> dict[str, str]:
        """The headers of the request to LM Studio."""
        found = headers.to_upstream(
            environ,
            body,
            self._upstream.authority,
            self._upstream.authorization,
            trusted=self._access.trusts_peer(environ),
        )
        found["X-Request-Id"] = environ[REQUEST_ID]
        if _endpoint(record) is not None:
            # nothing of the gateway (a comment, an error event) can stand in a compressed response
            found["Accept-Encoding"] = "identity"
        return found

    def _respond(
        self, environ: Environ, exchange: Exchange, tap: Tap, record: Record
    ) -> ProxyResponse:
        """Send the request and wait for the response; abort the exchange if the client disconnects
        meanwhile."""
        watch = cancellation.watch(environ, exchange.abort)
        try:
            exchange.send()
            record.upstream_sent = time.monotonic()
            if watch is not None:
                watch.restart()  # the body may have been read from the client just now
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
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        try:
            head = exchange.wait_head(self._head_timeout(record, deadline))
        except ReadTimeout:
            if not record.stream or (self._stream_timeout or HEARTBEAT + 1) <= HEARTBEAT:
                raise UpstreamTimeout("LM Studio did not answer in time.") from None
            record.status = 200
            stream_headers = headers.of_stream(
                [("Content-Type", sse.CONTENT_TYPE), headers.NO_SNIFF]
            )
            pieces = relay.late_stream(exchange, tap, self._stream_timeout, record, dialect)
            return "200 OK", stream_headers, pieces
        record.upstream_head = time.monotonic()
        record.status = head.status
        response_headers = headers.to_client(head.status, head.headers)
        if head.status < 400 and relay.is_event_stream(exchange) and record.method != "HEAD":
            response_headers = headers.of_stream(response_headers)
            if head.content_coding is not None:
                pieces = relay.coded_stream(exchange, self._stream_timeout, record)
            else:
                pieces = relay.stream(exchange, tap, self._stream_timeout, record, dialect)
        else:
            first = _first_piece(exchange, record.method, deadline, dialect)
            pieces = relay.plain(exchange, first, deadline, record)
        return f"{head.status} {head.reason}".rstrip(), response_headers, pieces

    def _head_timeout(self, record: Record, deadline: float | None) -> float | None:
        """Seconds to wait for the head before the gateway responds by itself: with an error, or
        with the first comment of a stream."""
        if not record.stream:
            return remaining(deadline)
        return min(HEARTBEAT, self._stream_timeout or HEARTBEAT)


def _endpoint(record: Record) -> injection.Endpoint | None:
    """The injection rule of a request, None if its endpoint has none."""
    return injection.ENDPOINTS.get(record.path) if record.method == "POST" else None


def _first_piece(exchange: Exchange, method: str, deadline: float | None, dialect: str) -> bytes:
    """Read the beginning of a plain response.

    Raises the error that an upstream error body holds, or that LM Studio put into a 200.
    """
    if exchange.complete and (exchange.head.status < 400 or method == "HEAD"):
        return b""
    try:
        first = exchange.receive(remaining(deadline))
    except ReadTimeout:
        raise UpstreamTimeout("LM Studio did not answer in time.") from None
    status = exchange.head.status
    encoding = exchange.head.content_coding
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
        try:
            raise error
        finally:
            del error  # else the traceback makes a cycle, which keeps the exchange
    return first


def _bad_gateway(fault: ConnectionBroken) -> BadGateway:
    return BadGateway(f"LM Studio broke off the exchange: {fault}.")
