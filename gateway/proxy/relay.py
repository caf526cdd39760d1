"""LM Studio's answer on its way to the client: bytes out as they come in.

:class:`Relay` is the body of the client's response. It owns the exchange: whatever ends it, closes
the upstream connection (or gives it back), stops watching the client and completes the record.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator

from gateway import sse
from gateway.errors import BadGateway, GatewayError, UpstreamTimeout, payload
from gateway.lmstudio import ConnectionBroken, Exchange, ReadTimeout
from gateway.observe import Record
from gateway.proxy.repair import MAX_ERROR_BYTES, as_error
from gateway.proxy.usage import Tap, usages
from gateway.request import ClientWatch
from gateway.sse import HEARTBEAT

#: How much of the end of a plain answer is kept to find its usage.
TAIL_BYTES = 16384


class Cut(ConnectionResetError):
    """Ends the response without its proper end, so that it can't be taken for complete.

    A server closes the client's connection quietly when an application fails like this.
    """

    def __init__(self, why: str) -> None:
        super().__init__(errno.ECONNRESET, why)


class Relay(Iterator[bytes]):
    """The pieces of one response body. To be closed, like every WSGI iterable."""

    def __init__(
        self,
        pieces: Iterator[bytes],
        exchange: Exchange,
        watch: ClientWatch | None,
        record: Record,
    ) -> None:
        self._pieces = pieces
        self._exchange = exchange
        self._watch = watch
        self._record = record
        self._finished = False

    def __next__(self) -> bytes:
        try:
            piece = next(self._pieces)
        except StopIteration:
            # a client that leaves from here on has got everything
            self._finished = True
            raise
        self._record.sent(piece)
        return piece

    def close(self) -> None:
        """Give up what belongs to this exchange; a client that has not got all of it has left."""
        if self._watch is not None:
            self._watch.stop()
        self._exchange.close()
        self._record.finish(cancelled=not self._finished and not self._record.failed)


def plain(
    exchange: Exchange, first: bytes, deadline: float | None, record: Record
) -> Iterator[bytes]:
    """A plain answer: its first piece, which has been read already, and the rest."""
    tail = first
    try:
        if first:
            yield first
        while True:
            data = exchange.receive(remaining(deadline))
            if not data:
                break
            tail = (tail + data)[-TAIL_BYTES:] if len(data) < TAIL_BYTES else data[-TAIL_BYTES:]
            yield data
    except ReadTimeout:
        record.fail("LM Studio did not finish its answer within PROXY_TIMEOUT.")
        raise Cut("PROXY_TIMEOUT passed") from None
    except ConnectionBroken as fault:
        if not exchange.aborted:
            record.fail(f"LM Studio broke its answer off: {fault}.")
        raise Cut(str(fault)) from None
    for usage in usages(tail):
        record.tokens.update(usage)


def stream(
    exchange: Exchange, tap: Tap, silence: float | None, record: Record, dialect: str
) -> Iterator[bytes]:
    """An event stream: every arrival at once, a comment in long silences, an error event when LM
    Studio breaks it off."""
    yield b""  # the head goes out now, not with the first event
    if exchange.head.get("content-encoding"):
        tap = Tap(remove=False)  # nothing can be found in coded bytes: none are held back
    try:
        yield from _arrivals(exchange, tap, silence)
        rest = tap.rest()
        if rest:
            yield rest
        record.tokens.update(tap.tokens)
    except (ConnectionBroken, UpstreamTimeout) as fault:
        record.tokens.update(tap.tokens)
        yield from cut_stream(fault, exchange, tap, record, dialect)


def late_stream(
    exchange: Exchange, tap: Tap, silence: float | None, record: Record, dialect: str
) -> Iterator[bytes]:
    """A stream that was answered before LM Studio sent its head (it had been silent for long)."""
    yield sse.KEEP_ALIVE
    try:
        for _ in _await_head(exchange, silence):
            yield sse.KEEP_ALIVE
        if is_event_stream(exchange):
            yield from stream(exchange, tap, silence, record, dialect)
            return
        content = collect(exchange, silence)
    except (ConnectionBroken, UpstreamTimeout) as fault:
        yield from cut_stream(fault, exchange, tap, record, dialect)
        return
    error = as_error(exchange.head.status, content)
    if error is None:
        yield b"data: " + content.replace(b"\n", b"\ndata: ") + b"\n\n"
        return
    record.fail(error.message)
    told = payload(error.message, error.status, error.code, dialect, error=error)
    yield sse.error_event(told, named=dialect == "anthropic")


def cut_stream(
    fault: Exception, exchange: Exchange, tap: Tap, record: Record, dialect: str
) -> Iterator[bytes]:
    """End a stream visibly broken: an error event, then no proper end of the response."""
    if exchange.aborted and not exchange.abort_reason:
        raise Cut("the client left")
    error = fault if isinstance(fault, GatewayError) else _as_error(fault, exchange)
    record.fail(error.message)
    told = payload(error.message, error.status, error.code, dialect, error=error)
    begun = b"" if tap.between_events else b"\n\n"
    yield begun + sse.error_event(told, named=dialect == "anthropic")
    raise Cut(error.message)


def _as_error(fault: Exception, exchange: Exchange) -> GatewayError:
    if exchange.abort_reason:
        return GatewayError(exchange.abort_reason, status=503, code="overloaded")
    return BadGateway(f"LM Studio broke the stream off: {fault}.")


def is_event_stream(exchange: Exchange) -> bool:
    """Whether the answer is an event stream."""
    kind = exchange.head.get("content-type") or ""
    return kind.partition(";")[0].strip().lower() == "text/event-stream"


def collect(exchange: Exchange, timeout: float | None, limit: int = MAX_ERROR_BYTES) -> bytes:
    """The answer's body, at most about ``limit`` bytes of it."""
    pieces = []
    size = 0
    while size < limit:
        try:
            data = exchange.receive(timeout)
        except ReadTimeout:
            raise UpstreamTimeout("LM Studio did not finish its answer.") from None
        if not data:
            break
        pieces.append(data)
        size += len(data)
    return b"".join(pieces)


def remaining(deadline: float | None) -> float | None:
    """Seconds until a deadline (of time.monotonic()), never quite 0."""
    return None if deadline is None else max(0.001, deadline - time.monotonic())


def _arrivals(exchange: Exchange, tap: Tap, silence: float | None) -> Iterator[bytes]:
    """What goes to the client for each arrival, with comments in between."""
    pause = min(HEARTBEAT, silence or HEARTBEAT)
    quiet = 0.0
    while True:
        try:
            data = exchange.receive(pause)
        except ReadTimeout:
            quiet += pause
            if silence is not None and quiet >= silence:
                raise UpstreamTimeout("LM Studio was silent for PROXY_STREAM_TIMEOUT.") from None
            if tap.between_events and quiet >= HEARTBEAT:
                yield sse.KEEP_ALIVE
            pause = min(HEARTBEAT, silence - quiet) if silence is not None else HEARTBEAT
            continue
        if not data:
            return
        quiet = 0.0
        pause = min(HEARTBEAT, silence or HEARTBEAT)
        out = tap.feed(data)
        if out:
            yield out


def _await_head(exchange: Exchange, silence: float | None) -> Iterator[None]:
    """Wait for the head; yields after each heartbeat's time without one."""
    quiet = HEARTBEAT
    while True:
        if silence is not None and quiet >= silence:
            raise UpstreamTimeout("LM Studio was silent for PROXY_STREAM_TIMEOUT.")
        pause = HEARTBEAT if silence is None else min(HEARTBEAT, silence - quiet)
        try:
            exchange.wait_head(pause)
            return
        except ReadTimeout:
            quiet += pause
            yield
