"""Relays LM Studio's response to the client, byte for byte, as it arrives.

:class:`Relay` is the body of the client's response. It owns the exchange: however the response
ends, closing the Relay closes the upstream connection (or returns it to the pool), stops watching
the client and completes the record.
"""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterator

from gateway import sse
from gateway.clock import remaining
from gateway.errors import BadGateway, GatewayError, UpstreamTimeout, payload
from gateway.lmstudio import ConnectionBroken, Exchange, ReadTimeout
from gateway.observe import Record
from gateway.proxy.repair import MAX_ERROR_BYTES, decode, error_in
from gateway.proxy.usage import Tap, usages
from gateway.request import ClientWatch
from gateway.sse import HEARTBEAT

#: Bytes kept from the end of a plain response, where its usage is.
TAIL_BYTES = 16384


class ResponseAborted(ConnectionResetError):
    """Raised in the middle of a body to end the response without a proper end, so that no client
    mistakes it for complete.

    WSGI servers close the client's connection, and log no traceback, when an application fails
    with this kind of error.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(errno.ECONNRESET, reason)


class Relay(Iterator[bytes]):
    """The pieces of one response body. The WSGI server closes it, like every response iterable."""

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
            # a client that disconnects from here on has received everything
            self._finished = True
            raise
        self._record.sent(piece)
        return piece

    def close(self) -> None:
        """Release the exchange. A client that has not received all of it counts as cancelled."""
        if self._watch is not None:
            self._watch.stop()
        self._exchange.close()
        self._record.finish(cancelled=not self._finished and not self._record.failed)


def plain(
    exchange: Exchange, first: bytes, deadline: float | None, record: Record
) -> Iterator[bytes]:
    """Relay a response that is not a stream; ``first`` is the part of it that has been read."""
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
        record.fail("LM Studio did not finish its response within PROXY_TIMEOUT.")
        raise ResponseAborted("PROXY_TIMEOUT passed") from None
    except ConnectionBroken as fault:
        if not exchange.aborted:
            record.fail(f"LM Studio broke off its response: {fault}.")
        raise ResponseAborted(str(fault)) from None
    if exchange.head.content_coding is None:
        for usage in usages(tail):
            record.tokens.update(usage)


def stream(
    exchange: Exchange, tap: Tap, timeout: float | None, record: Record, dialect: str
) -> Iterator[bytes]:
    """Relay an event stream as it arrives, with a comment in each long silence and an error event
    when LM Studio breaks it off.

    ``timeout`` is the longest silence allowed, in seconds (None: no limit).
    """
    yield b""  # sends the head now, not with the first event
    try:
        yield from _tapped(exchange, tap, timeout)
        rest = tap.flush()
        if rest:
            yield rest
        record.tokens.update(tap.tokens)
    except (ConnectionBroken, UpstreamTimeout) as fault:
        record.tokens.update(tap.tokens)
        yield from abort_stream(fault, exchange, tap, record, dialect)


def coded_stream(exchange: Exchange, timeout: float | None, record: Record) -> Iterator[bytes]:
    """Relay a compressed event stream as it arrives, with nothing of the gateway's between its
    bytes: no comment and no error event. If it breaks off, the response is cut.
    """
    yield b""
    try:
        while data := exchange.receive(timeout):
            yield data
    except ReadTimeout:
        record.fail(_stream_timed_out().message)
        raise ResponseAborted("PROXY_STREAM_TIMEOUT passed") from None
    except ConnectionBroken as fault:
        if not exchange.aborted or exchange.abort_reason:
            record.fail(_stream_error(fault, exchange).message)
        raise ResponseAborted(str(fault)) from None


def late_stream(
    exchange: Exchange, tap: Tap, timeout: float | None, record: Record, dialect: str
) -> Iterator[bytes]:
    """Relay a stream that the gateway began itself, because LM Studio's head was late.

    The client has already received status 200, so a failure can only be reported as an error event.
    """
    yield sse.KEEP_ALIVE
    try:
        for _ in _await_head(exchange, timeout):
            yield sse.KEEP_ALIVE
        if exchange.head.content_coding is not None:
            yield from _late_coded(exchange, tap, timeout, record, dialect)
        elif is_event_stream(exchange):
            yield from stream(exchange, tap, timeout, record, dialect)
        else:
            tap = Tap(remove_usage=False)  # a plain response has no usage chunk
            yield from _late_plain(exchange, tap, timeout, record, dialect)
    except (ConnectionBroken, UpstreamTimeout) as fault:
        yield from abort_stream(fault, exchange, tap, record, dialect)


def _late_plain(
    exchange: Exchange, tap: Tap, timeout: float | None, record: Record, dialect: str
) -> Iterator[bytes]:
    """Relay a plain response as one event, or as the error event if it is an error."""
    content = yield from _collect_quietly(exchange, timeout)
    error = error_in(exchange.head.status, content)
    if error is not None:
        record.fail(error.report)
        yield _error_event(error, dialect)
        return
    yield tap.feed(b"data: " + _as_data(content))
    while not exchange.complete:
        data = _receive(exchange, timeout)
        if data:
            yield tap.feed(_as_data(data))
    yield tap.feed(b"\n\n")
    record.tokens.update(tap.tokens)


def _late_coded(
    exchange: Exchange, tap: Tap, timeout: float | None, record: Record, dialect: str
) -> Iterator[bytes]:
    """Relay a compressed response whose client has got a head that does not say so: decoded if it
    is small, else as an error."""
    content = yield from _collect_quietly(exchange, timeout)
    status = exchange.head.status
    decoded = decode(content, exchange.head.content_coding) if exchange.complete else None
    if decoded is None or len(decoded) > MAX_ERROR_BYTES:
        raise ConnectionBroken(f"its response ({status}) is compressed and can't be decoded here")
    if status < 400 and is_event_stream(exchange):
        yield tap.feed(decoded) + tap.flush()
        record.tokens.update(tap.tokens)
        return
    error = error_in(status, decoded)
    if error is None:
        yield b"data: " + _as_data(decoded) + b"\n\n"
        return
    record.fail(error.report)
    yield _error_event(error, dialect)


def _as_data(content: bytes) -> bytes:
    """Turn the line ends of a response into those of an event's data."""
    lines = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return lines.replace(b"\n", b"\ndata: ")


def abort_stream(
    fault: Exception, exchange: Exchange, tap: Tap, record: Record, dialect: str
) -> Iterator[bytes]:
    """End a stream so that clients see that it broke: with an error event, and without the proper
    end of the response."""
    if exchange.aborted and not exchange.abort_reason:
        raise ResponseAborted("the client disconnected")
    error = fault if isinstance(fault, GatewayError) else _stream_error(fault, exchange)
    record.fail(error.report)
    # ends an event that the client has received only in part
    separator = b"" if tap.between_events else b"\n\n"
    yield separator + _error_event(error, dialect)
    raise ResponseAborted(error.message)


def _stream_error(fault: Exception, exchange: Exchange) -> GatewayError:
    if exchange.abort_reason:
        return GatewayError(exchange.abort_reason, status=503, code="overloaded")
    return BadGateway(f"LM Studio broke off the stream: {fault}.")


def _error_event(error: GatewayError, dialect: str) -> bytes:
    data = payload(error.message, error.status, error.code, dialect, error=error)
    return sse.error_event(data, named=dialect == "anthropic")


def is_event_stream(exchange: Exchange) -> bool:
    """Whether LM Studio's response is an event stream."""
    content_type = exchange.head.get("content-type") or ""
    return content_type.partition(";")[0].strip().lower() == "text/event-stream"


def collect(exchange: Exchange, timeout: float | None, limit: int = MAX_ERROR_BYTES) -> bytes:
    """Read the body of a response, at most about ``limit`` bytes of it.

    ``timeout`` is the longest wait for each arrival, in seconds. Raises UpstreamTimeout.
    """
    pieces = []
    size = 0
    while size < limit and (data := _receive(exchange, timeout)):
        pieces.append(data)
        size += len(data)
    return b"".join(pieces)


def _receive(exchange: Exchange, timeout: float | None) -> bytes:
    try:
        return exchange.receive(timeout)
    except ReadTimeout:
        raise UpstreamTimeout("LM Studio did not finish its response.") from None


def _collect_quietly(exchange: Exchange, timeout: float | None) -> Generator[bytes, None, bytes]:
    """Read as :func:`collect` does, and yield a comment in each long silence."""
    pieces = []
    size = 0
    for data in _arrivals(exchange, timeout):
        if data is None:
            yield sse.KEEP_ALIVE
            continue
        pieces.append(data)
        size += len(data)
        if size > MAX_ERROR_BYTES:
            break
    return b"".join(pieces)


def _tapped(exchange: Exchange, tap: Tap, timeout: float | None) -> Iterator[bytes]:
    """Yield what the client gets for each arrival, and comments during silences."""
    for data in _arrivals(exchange, timeout):
        if data is None:
            out = sse.KEEP_ALIVE if tap.between_events else b""
        else:
            out = tap.feed(data)
        if out:
            yield out


def _arrivals(exchange: Exchange, timeout: float | None) -> Iterator[bytes | None]:
    """Yield each arrival, and None whenever nothing has arrived for as long as a heartbeat.

    Raises UpstreamTimeout after ``timeout`` seconds without an arrival.
    """
    quiet = 0.0
    while True:
        pause = _pause(timeout, quiet)
        try:
            data = exchange.receive(pause)
        except ReadTimeout:
            quiet += pause
            if timeout is not None and quiet >= timeout:
                raise _stream_timed_out() from None
            if quiet >= HEARTBEAT:
                yield None
            continue
        if not data:
            return
        quiet = 0.0
        yield data


def _await_head(exchange: Exchange, timeout: float | None) -> Iterator[None]:
    """Wait for the head, which is already one heartbeat late; yields whenever a comment is due.

    Raises UpstreamTimeout.
    """
    quiet = HEARTBEAT
    while True:
        if timeout is not None and quiet >= timeout:
            raise _stream_timed_out()
        pause = _pause(timeout, quiet)
        try:
            exchange.wait_head(pause)
            return
        except ReadTimeout:
            quiet += pause
            yield


def _pause(timeout: float | None, quiet: float) -> float:
    """Seconds to wait, ``quiet`` seconds into a silence: until a comment is due or the timeout."""
    return HEARTBEAT if timeout is None else min(HEARTBEAT, timeout - quiet)


def _stream_timed_out() -> UpstreamTimeout:
    return UpstreamTimeout("LM Studio sent nothing within PROXY_STREAM_TIMEOUT.")
