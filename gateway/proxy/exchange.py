"""The inference proxy: the story of one exchange.

``/v1/*``, the shorthand paths and ``/api/*``: authorised elsewhere, here resolved, injected, sent,
relayed. :meth:`Proxy.exchange` works on the WSGI environ and is all that the blueprint calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gateway import errors
from gateway.errors import BadGateway, GatewayError, Headers, UpstreamTimeout
from gateway.lmstudio import ConnectionBroken, Exchange, Silence, Upstream
from gateway.observe import Record, Reporter
from gateway.proxy import injection, relay, repair
from gateway.proxy.usage import Tap
from gateway.request import (
    CLIENT,
    REQUEST_ID,
    Access,
    ClientGone,
    bodies,
    cancellation,
    headers,
    upstream_target,
)
from gateway.settings import Settings
from gateway.sse import HEARTBEAT
from gateway.state import SharedStore

Environ = dict[str, Any]

#: Set in the environ of a request that the access log tells as an exchange.
RECORDED = "gateway.recorded"
#: Exchanges that one worker runs at a time; well below its connections, so that /health and /admin
#: still get theirs.
MAX_EXCHANGES = 2048


@dataclass
class Answer:
    """What goes back: complete but for ``X-Request-Id`` and CORS."""

    status: str
    headers: Headers
    body: Iterable[bytes]


class Overloaded(GatewayError):
    """This worker runs as many exchanges as it takes. Nothing waits in it: the bound on waiting
    requests is the listening socket's backlog."""

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
        accounts: Reporter,
    ) -> None:
        self._access = access
        self._store = store
        self._upstream = upstream
        self._accounts = accounts
        self._max_body_bytes = settings.max_body_bytes
        self._timeout = settings.proxy_timeout
        self._silence = settings.proxy_stream_timeout
        self._running: set[Exchange] = set()

    def exchange(self, environ: Environ) -> Answer:
        """Serve one request; raises a GatewayError when LM Studio gives nothing to relay."""
        path, target = upstream_target(environ)
        record = Record(
            request_id=environ[REQUEST_ID],
            client=environ.get(CLIENT, ""),
            method=environ["REQUEST_METHOD"],
            path=path,
        )
        try:
            body, usage_added = self._prepare(environ, record)
            exchange = self._send(environ, target, body, usage_added)
            record.upstream_sent = time.monotonic()
            return self._answer(environ, exchange, Tap(remove=usage_added), record)
        except Exception as error:
            record.status = error.status if isinstance(error, GatewayError) else 500
            record.fail(str(error))
            record.finish(cancelled=isinstance(error, ClientGone))
            raise

    def cut_all(self) -> None:
        """End what still runs: the worker's grace period is over."""
        for exchange in list(self._running):
            exchange.abort("The gateway is shutting down.")

    def _prepare(self, environ: Environ, record: Record) -> tuple[bodies.Body, bool]:
        """The body that goes upstream, injected where the table says so, and whether the stream's
        usage was asked for by us. Tells that the exchange begins, whatever comes of it."""
        endpoint = injection.TABLE.get(record.path) if record.method == "POST" else None
        try:
            if endpoint is None or environ.get("HTTP_CONTENT_ENCODING"):
                return bodies.stream_body(environ, self._max_body_bytes), False
            content = bodies.read_body(environ, self._max_body_bytes)
            prepared = injection.prepare(endpoint, content, self._store.active)
            record.requested_model = prepared.asked_model or ""
            record.model = prepared.model
            record.stream = prepared.stream
            return prepared.body, prepared.added_usage
        finally:
            if not record.path.startswith("/api/"):
                environ[RECORDED] = True
                self._accounts.begin(record)

    def _send(
        self, environ: Environ, target: str, body: bodies.Body, usage_added: bool
    ) -> Exchange:
        """Send the request to LM Studio, whose answer comes later."""
        if len(self._running) >= MAX_EXCHANGES:
            raise Overloaded("The gateway is busy with other requests; try again.")
        told = headers.to_upstream(
            environ,
            body,
            self._upstream.authority,
            self._upstream.authorization,
            trusted=self._access.trusts_peer(environ),
        )
        told["X-Request-Id"] = environ[REQUEST_ID]
        if usage_added:
            told["Accept-Encoding"] = "identity"  # the usage chunk must be found in the bytes
        try:
            exchange = self._upstream.send(environ["REQUEST_METHOD"], target, told, body)
        except ConnectionBroken as fault:
            raise _broken(fault) from None
        self._running.add(exchange)
        exchange.on_close = self._running.discard
        return exchange

    def _answer(self, environ: Environ, exchange: Exchange, tap: Tap, record: Record) -> Answer:
        """Wait for the answer while the client is watched; a client that leaves ends it."""
        watch = cancellation.watch(environ, exchange.abort)
        try:
            spoken = errors.dialect(environ["PATH_INFO"])
            status, told, pieces = self._relay(exchange, tap, record, spoken)
        except BaseException as fault:
            if watch is not None:
                watch.stop()
            exchange.close()
            if watch is not None and watch.gone:
                raise ClientGone("The client closed the connection.") from None
            if isinstance(fault, ConnectionBroken):
                reason = exchange.abort_reason
                raise (Overloaded(reason) if reason else _broken(fault)) from None
            raise
        return Answer(status, told, relay.Relay(pieces, exchange, watch, record))

    def _relay(
        self, exchange: Exchange, tap: Tap, record: Record, spoken: str
    ) -> tuple[str, Headers, Iterator[bytes]]:
        """Wait for LM Studio's head and choose the way in which its answer is relayed."""
        deadline = None if self._timeout is None else record.started + self._timeout
        try:
            head = exchange.wait_head(self._patience(record, deadline))
        except Silence:
            if not record.stream or (self._silence or HEARTBEAT + 1) <= HEARTBEAT:
                raise UpstreamTimeout("LM Studio did not answer in time.") from None
            record.status = 200
            told = headers.of_stream([("Content-Type", "text/event-stream; charset=utf-8")])
            pieces = relay.late_stream(exchange, tap, self._silence, record, spoken)
            return "200 OK", told, pieces
        record.upstream_head = time.monotonic()
        record.status = head.status
        told = headers.to_client(head.status, head.headers)
        if head.status < 400 and relay.is_event_stream(exchange) and record.method != "HEAD":
            told = headers.of_stream(told)
            pieces = relay.stream(exchange, tap, self._silence, record, spoken)
        else:
            first = _first_piece(exchange, deadline, spoken)
            pieces = relay.plain(exchange, first, deadline, record)
        return f"{head.status} {head.reason}".rstrip(), told, pieces

    def _patience(self, record: Record, deadline: float | None) -> float | None:
        """Seconds to wait for the head before something must be done."""
        if not record.stream:
            return relay.remaining(deadline)
        return min(HEARTBEAT, self._silence or HEARTBEAT)


def _first_piece(exchange: Exchange, deadline: float | None, spoken: str) -> bytes:
    """The beginning of a plain answer; raises the error that is hidden in it (§3)."""
    if exchange.complete:
        return b""
    try:
        first = exchange.receive(relay.remaining(deadline))
    except Silence:
        raise UpstreamTimeout("LM Studio did not answer in time.") from None
    status = exchange.head.status
    encoding = exchange.head.get("content-encoding")
    error = None
    if status >= 400:
        first += relay.collect(exchange, relay.remaining(deadline))
        error = repair.wrapped(status, first, encoding, spoken)
    elif status == 200:
        if encoding is None and repair.starts_like_error(first):
            first += relay.collect(exchange, relay.remaining(deadline))
        if exchange.complete and len(first) <= repair.MAX_ERROR_BYTES:
            error = repair.hidden_error(first, encoding)
    if error is not None:
        error.headers = headers.with_error(exchange.head.headers, error)
        raise error
    return first


def _broken(fault: ConnectionBroken) -> BadGateway:
    return BadGateway(f"LM Studio broke the exchange off: {fault}.")
