"""The inference proxy: the story of one exchange.

``/v1/*``, the shorthand paths and ``/api/*``: authorised elsewhere, here resolved, injected, sent,
relayed. :func:`exchange` works on the WSGI environ and is all that the blueprint calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import gevent
from flask import Blueprint, Response, current_app, request
from werkzeug.routing import Rule

from gateway import cancellation, errors, injection, relay, repair, sse
from gateway.access import CLIENT, REQUEST_ID, Access
from gateway.accounts import Accounts
from gateway.errors import (
    BadGateway,
    BadRequest,
    BodyTooLarge,
    GatewayError,
    Headers,
    RequestTimeout,
)
from gateway.record import Record
from gateway.settings import Settings
from gateway.store import SharedStore
from gateway.target import upstream_target
from gateway.upstream import ConnectionBroken, Exchange, Silence, Upstream

Environ = dict[str, Any]

#: Request headers that end here, beside those that ``Connection`` names. ``Forwarded`` and
#: ``X-Forwarded-*`` are written anew.
_NOT_FORWARDED = frozenset(
    {
        "HTTP_HOST",
        "HTTP_AUTHORIZATION",
        "HTTP_X_API_KEY",
        "HTTP_COOKIE",
        "HTTP_EXPECT",
        "HTTP_CONTENT_LENGTH",
        "HTTP_X_REQUEST_ID",
        "HTTP_FORWARDED",
        "HTTP_CONNECTION",
        "HTTP_KEEP_ALIVE",
        "HTTP_PROXY_AUTHENTICATE",
        "HTTP_PROXY_AUTHORIZATION",
        "HTTP_PROXY_CONNECTION",
        "HTTP_TE",
        "HTTP_TRAILER",
        "HTTP_TRANSFER_ENCODING",
        "HTTP_UPGRADE",
    }
)
#: Response headers that end here. The WSGI server writes Date and Server itself, and who may read
#: the gateway's answers across origins is the gateway's to say.
_NOT_RELAYED = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "date",
        "server",
        "x-request-id",
    }
)
#: Set in the environ of a request that the access log tells as an exchange.
RECORDED = "gateway.recorded"
#: A request's body: whole, piece by piece, or none.
Body = bytes | Iterator[bytes] | None

_STREAM_HEADERS = [("X-Accel-Buffering", "no"), ("Cache-Control", "no-cache")]
_READ_BYTES = 65536
#: Exchanges that one worker runs at a time; well below its connections, so that /health and /admin
#: still get theirs.
MAX_EXCHANGES = 2048
#: Seconds in which each READ_BYTES of a request body must come: a trickling client is not served.
READ_TIMEOUT = 30.0


@dataclass
class Answer:
    """What goes back: complete but for ``X-Request-Id`` and CORS."""

    status: str
    headers: Headers
    body: Iterable[bytes]


class ClientGone(GatewayError):
    """The client left before there was anything to answer; nobody reads this."""

    status, code = 499, "client_closed_request"


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
        accounts: Accounts,
    ) -> None:
        self._settings = settings
        self._access = access
        self._store = store
        self._upstream = upstream
        self._accounts = accounts
        self._running: set[Exchange] = set()

    def cut_all(self) -> None:
        """End what still runs: the worker's grace period is over."""
        for exchange in list(self._running):
            exchange.abort("The gateway is shutting down.")

    def exchange(self, environ: Environ) -> Answer:
        """Serve one request; raises a GatewayError when LM Studio gives nothing to relay."""
        path, target = upstream_target(environ)
        record = self._record(environ, path)
        try:
            return self._serve(environ, path, target, record)
        except GatewayError as error:
            record.status = error.status
            record.fail(error.message)
            record.finish(cancelled=isinstance(error, ClientGone))
            raise

    def _serve(self, environ: Environ, path: str, target: str, record: Record) -> Answer:
        """Inject, tell that it begins, send, answer."""
        method = environ["REQUEST_METHOD"]
        endpoint = injection.TABLE.get(path) if method == "POST" else None
        prepared = None
        body: Body
        try:
            if endpoint is not None and not environ.get("HTTP_CONTENT_ENCODING"):
                content = read_body(environ, self._settings.max_body_bytes)
                prepared = injection.prepare(endpoint, content, self._store.active)
                body = prepared.body
                record.asked_model = prepared.asked_model or ""
                record.model = prepared.model
                record.stream = prepared.stream
            else:
                body = stream_body(environ, self._settings.max_body_bytes)
        finally:
            if not path.startswith("/api/"):
                environ[RECORDED] = True
                self._accounts.begin(record)
        headers = self._request_headers(environ, body, prepared)
        return self._send(environ, method, target, headers, body, prepared, record)

    def _send(
        self,
        environ: Environ,
        method: str,
        target: str,
        headers: dict[str, str],
        body: Body,
        prepared: injection.Prepared | None,
        record: Record,
    ) -> Answer:
        if len(self._running) >= MAX_EXCHANGES:
            raise Overloaded("The gateway is busy with other requests; try again.")
        try:
            exchange = self._upstream.send(method, target, headers, body)
        except ConnectionBroken as fault:
            raise BadGateway(f"LM Studio broke the exchange off: {fault}.") from None
        record.upstream_sent = time.monotonic()
        self._running.add(exchange)
        exchange.on_close = self._running.discard
        watch = cancellation.watch(environ, exchange.abort)
        try:
            answer = self._answer(exchange, watch, prepared, record, environ["PATH_INFO"])
        except BaseException as fault:
            if watch is not None:
                watch.stop()
            exchange.close()
            if watch is not None and watch.gone:
                raise ClientGone("The client closed the connection.") from None
            if isinstance(fault, ConnectionBroken) and exchange.abort_reason:
                raise Overloaded(exchange.abort_reason) from None
            if isinstance(fault, ConnectionBroken):
                raise BadGateway(f"LM Studio broke the exchange off: {fault}.") from None
            raise
        return answer

    def _answer(
        self,
        exchange: Exchange,
        watch: cancellation.ClientWatch | None,
        prepared: injection.Prepared | None,
        record: Record,
        path: str,
    ) -> Answer:
        """Wait for LM Studio's head and choose the way in which its answer is relayed."""
        spoken = errors.dialect(path)
        silence = self._settings.proxy_stream_timeout
        deadline = self._deadline(record)
        tap = sse.Tap(remove=prepared is not None and prepared.added_usage)
        pieces: Iterator[bytes]
        try:
            streams = prepared is not None and prepared.stream
            head = exchange.wait_head(
                min(relay.HEARTBEAT, silence or relay.HEARTBEAT)
                if streams
                else relay.remaining(deadline)
            )
        except Silence:
            if not streams or (silence is not None and silence <= relay.HEARTBEAT):
                raise errors.UpstreamTimeout("LM Studio did not answer in time.") from None
            record.status = 200
            headers = [("Content-Type", "text/event-stream; charset=utf-8"), *_STREAM_HEADERS]
            pieces = relay.late_stream(exchange, tap, silence, record, spoken)
            return Answer("200 OK", headers, relay.Relay(pieces, exchange, watch, record))
        record.upstream_head = time.monotonic()
        record.status = head.status
        status = f"{head.status} {head.reason}".rstrip()
        headers = _response_headers(head.headers)
        if (
            head.status < 400
            and relay.is_event_stream(exchange)
            and exchange.request.method != "HEAD"
        ):
            headers = _without(headers, "cache-control", "x-accel-buffering", "content-length")
            pieces = relay.stream(exchange, tap, silence, record, spoken)
            headers += _STREAM_HEADERS
        else:
            first = self._first_piece(exchange, deadline, spoken)
            headers = _with_retry_advice(head.status, headers)
            pieces = relay.plain(exchange, first, deadline, record)
        return Answer(status, headers, relay.Relay(pieces, exchange, watch, record))

    def _first_piece(self, exchange: Exchange, deadline: float | None, spoken: str) -> bytes:
        """The beginning of a plain answer; raises the error that is hidden in it (§3)."""
        if exchange.complete:
            return b""
        try:
            first = exchange.receive(relay.remaining(deadline))
        except Silence:
            raise errors.UpstreamTimeout("LM Studio did not answer in time.") from None
        encoding = exchange.head.get("content-encoding")
        if exchange.head.status >= 400:
            first += relay.collect(exchange, relay.remaining(deadline))
            error = repair.wrapped(exchange.head.status, first, encoding, spoken)
        elif exchange.head.status == 200:
            if encoding is None and repair.starts_like_error(first):
                first += relay.collect(exchange, relay.remaining(deadline))
            looked_at = exchange.complete and len(first) <= repair.MAX_ERROR_BYTES
            error = repair.hidden_error(first, encoding) if looked_at else None
        else:
            error = None
        if error is not None:
            error.headers = _error_headers(exchange.head.headers, error)
            raise error
        return first

    def _deadline(self, record: Record) -> float | None:
        timeout = self._settings.proxy_timeout
        return None if timeout is None else record.started + timeout

    def _record(self, environ: Environ, path: str) -> Record:
        return Record(
            request_id=environ[REQUEST_ID],
            client=environ.get(CLIENT, ""),
            method=environ["REQUEST_METHOD"],
            path=path,
        )

    def _request_headers(
        self,
        environ: Environ,
        body: Body,
        prepared: injection.Prepared | None,
    ) -> dict[str, str]:
        """The headers that go upstream, in wire form."""
        headers = {"Host": self._upstream.authority}
        named = _named_in_connection(environ)
        for key, value in environ.items():
            if (
                key.startswith("HTTP_")
                and key not in _NOT_FORWARDED
                and not key.startswith("HTTP_X_FORWARDED_")
                and key not in named
            ):
                headers[key[5:].replace("_", "-").title()] = value
        if environ.get("CONTENT_TYPE"):
            headers["Content-Type"] = environ["CONTENT_TYPE"]
        if isinstance(body, bytes):
            headers["Content-Length"] = str(len(body))
        elif body is not None and environ.get("CONTENT_LENGTH"):
            headers["Content-Length"] = environ["CONTENT_LENGTH"]
        elif body is not None:
            headers["Transfer-Encoding"] = "chunked"
        if prepared is not None and prepared.added_usage:
            headers["Accept-Encoding"] = "identity"  # the usage chunk must be found in the bytes
        if self._upstream.authorization is not None:
            headers["Authorization"] = self._upstream.authorization
        headers["X-Request-Id"] = environ[REQUEST_ID]
        headers.update(self._forwarded(environ))
        return headers

    def _forwarded(self, environ: Environ) -> dict[str, str]:
        """``X-Forwarded-*``: a trusted proxy's are continued, anybody else's replaced."""
        trusted = self._access.trusts_peer(environ)
        told = {
            "X-Forwarded-For": environ.get("HTTP_X_FORWARDED_FOR", "") if trusted else "",
            "X-Forwarded-Proto": environ.get("HTTP_X_FORWARDED_PROTO", "") if trusted else "",
            "X-Forwarded-Host": environ.get("HTTP_X_FORWARDED_HOST", "") if trusted else "",
        }
        peer = environ.get("REMOTE_ADDR") or ""
        hops = [hop for hop in (told["X-Forwarded-For"], peer) if hop]
        told["X-Forwarded-For"] = ", ".join(hops)
        told["X-Forwarded-Proto"] = told["X-Forwarded-Proto"] or environ["wsgi.url_scheme"]
        told["X-Forwarded-Host"] = told["X-Forwarded-Host"] or environ.get("HTTP_HOST", "")
        return {name: value for name, value in told.items() if value}


# The request's body ---------------------------------------------------------------------------


def check_length(environ: Environ, limit: int) -> None:
    """Refuse a body whose Content-Length tells already that it is too large."""
    length = environ.get("CONTENT_LENGTH") or "0"
    if length.isdigit() and int(length) > limit:
        raise too_large(limit)


def read_body(environ: Environ, limit: int) -> bytes:
    """The whole request body. Raises BodyTooLarge, or BadRequest when it breaks off."""
    return b"".join(_pieces(environ, limit))


def stream_body(environ: Environ, limit: int) -> Body:
    """The request body piece by piece, None when there is none."""
    length = environ.get("CONTENT_LENGTH") or ""
    chunked = "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "").lower()
    if not chunked and length in ("", "0"):
        return None if not length else b""
    return _pieces(environ, limit)


def too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {limit} bytes.")


def _pieces(environ: Environ, limit: int) -> Iterator[bytes]:
    check_length(environ, limit)
    source = environ["wsgi.input"]
    size = 0
    length = environ.get("CONTENT_LENGTH")
    expected = int(length) if length and length.isdigit() else None
    while expected is None or size < expected:
        wanted = _READ_BYTES if expected is None else min(_READ_BYTES, expected - size)
        try:
            with gevent.Timeout(READ_TIMEOUT, RequestTimeout("The request body came too slowly.")):
                piece = source.read(wanted)
        except GatewayError:
            raise
        except Exception as fault:
            # each WSGI server has its own exceptions for a body that breaks off or breaks rules
            what = type(fault).__name__
            raise BadRequest(f"The request body can't be read: {what}.") from None
        if not piece:
            break
        size += len(piece)
        if size > limit:
            raise too_large(limit)
        yield piece
    if expected is not None and size < expected:
        raise BadRequest("The request body broke off.")


# Headers --------------------------------------------------------------------------------------


def _named_in_connection(environ: Environ) -> set[str]:
    named = environ.get("HTTP_CONNECTION", "")
    if not named or named in ("keep-alive", "close"):
        return set()
    return {"HTTP_" + name.strip().upper().replace("-", "_") for name in named.split(",")}


def _response_headers(headers: Headers) -> Headers:
    """LM Studio's headers without those that are about its connection only."""
    named: set[str] = set()
    for name, value in headers:
        if name.lower() == "connection":
            named.update(item.strip().lower() for item in value.split(","))
    return [
        (name, value)
        for name, value in headers
        if name.lower() not in _NOT_RELAYED
        and name.lower() not in named
        and not name.lower().startswith("access-control-")
    ]


def _with_retry_advice(status: int, headers: Headers) -> Headers:
    """What the OpenAI SDKs look for in an error answer, where LM Studio does not say it."""
    names = {name.lower() for name, _ in headers}
    if status in (429, 503) and "retry-after" not in names:
        return [*headers, ("Retry-After", "5")]
    if status == 409 and "x-should-retry" not in names:
        return [*headers, ("x-should-retry", "false")]
    return headers


def _error_headers(headers: Headers, error: GatewayError) -> Headers:
    """LM Studio's headers that go with an error whose body the gateway writes anew."""
    about_body = ("content-type", "content-length", "content-encoding", "etag", "last-modified")
    kept = _without(_response_headers(headers), *about_body)
    return _with_retry_advice(error.status, kept)


def _without(headers: Headers, *names: str) -> Headers:
    return [(name, value) for name, value in headers if name.lower() not in names]


# The blueprint --------------------------------------------------------------------------------

blueprint = Blueprint("proxy", __name__)


@blueprint.record
def _register(state: Any) -> None:
    """Every proxied path, for every method: a rule of werkzeug's, as Flask's own always restrict
    the methods."""
    paths = [
        "/v1/<path:rest>",
        "/api/<path:rest>",
        "/models/<path:rest>",
        *sorted(errors.SHORTHAND),
    ]
    for path in paths:
        state.app.url_map.add(Rule(path, endpoint="proxy.exchange", methods=None))
    state.app.view_functions["proxy.exchange"] = view


def view(rest: str = "") -> Response:
    """Relay the current request."""
    proxy: Proxy = current_app.extensions["gateway"].proxy
    answer = proxy.exchange(request.environ)
    response = Response(answer.body, direct_passthrough=True)
    response.headers.clear()
    for name, value in answer.headers:
        response.headers.add(name, value)
    response.status = answer.status
    return response
