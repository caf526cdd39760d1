"""One port for everything: HTTP with its faults, WebSocket upgrades, TLS, and control paths.

Tests control and inspect the simulator below ``/_simulator/`` (see :meth:`.Simulator.control`) and
with request headers: ``X-Simulator-Fault`` (comma-separated names of the tables here),
``X-Simulator-Pace-Ms`` (between two tokens), ``-Prefill-Ms`` (before the response) and
``-Head-Delay-Ms`` (between its head and its body).
"""

from __future__ import annotations

import gzip
import signal
import socket
import ssl
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from http import HTTPStatus
from itertools import chain, count, islice
from typing import Any

import gevent
from gevent.event import Event
from gevent.pywsgi import WSGIHandler, WSGIServer

from gateway.simulator.http_api import Request, respond
from gateway.simulator.models import JsonObject
from gateway.simulator.response import Reply, Response, encoded, error_response
from gateway.simulator.state import Simulator
from gateway.simulator.websocket import Session

#: Request bodies beyond this many bytes are recorded as length and digest only; the records of
#: response bodies are cut there.
_BODY_LIMIT = 1 << 20
_CRASH = "The model has crashed without additional information. (Exit code: 6)"
_BUSY = error_response(429, "Too many requests.", type="requests", code="rate_limit_exceeded")
_BUSY.headers["Retry-After"] = "1"
#: Faults that replace the response.
_REPLACEMENTS = {
    "refuse-500": Response("<html><body><h1>500 Internal Server Error</h1></body></html>", 500),
    "error-string-500": Response({"error": _CRASH}, 500),
    "status-429": _BUSY,
    "error-200": Response({"error": _CRASH}),
    "error-200-object": error_response(200, _CRASH),
    "error-200-stream": Response({"error": _CRASH}),
}
#: Faults that end a stream after three tokens, each with the bytes that it sends instead.
_ENDS = {
    "break-stream": "",
    "silent-stream": "",
    "error-in-stream-event": f'event: error\ndata: {{"error": {{"message": "{_CRASH}"}}}}\n\n',
    "error-in-stream-data": f'data: {{"error": "{_CRASH}"}}\n\n',
}
#: Faults that break the response off; the exchange is recorded with the outcome ``fault``.
_BREAKING = {*_REPLACEMENTS, *_ENDS, "close-before-head", "garbage-head", "break-plain"}
#: Faults that only change how an intact response is sent.
_SHAPING = {"gzip", "split-bytes", "crlf", "big-answer", "one-chunk", "no-length"}
_ids = count(1)


class Handler(WSGIHandler):  # type: ignore[misc]  # gevent has no types here
    """One connection. gevent parses the requests; the responses bypass WSGI and are written raw."""

    _idle_timeout = 60.0  # s

    def read_requestline(self) -> str:
        """Wait for the next request: 60 s for the first, then 5 s as LM Studio does."""
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(self._idle_timeout)
        self._idle_timeout = 5.0
        line: str = super().read_requestline()
        self.socket.settimeout(None)
        return line

    def handle_one_response(self) -> None:
        """Answer the request that was just parsed."""
        self.simulator: Simulator = self.server.application
        self.record: JsonObject = {"sent": bytearray()}
        self.faults, self.pace, self.head_delay = set[str](), 0.0, 0.0
        try:
            if self.path.startswith("/_simulator/"):
                body = self.wsgi_input.read()
                self._deliver(self.simulator.control(self.command, self.path, body))
            elif self.headers.get("Upgrade", "").lower() != "websocket":
                self._exchange()
            elif self.simulator.switches.refuse_websockets:
                self._deliver(Response({}, 503, Connection="close"))
            else:
                self.close_connection = True
                Session(self.simulator, self).serve()
        except OSError:
            self.close_connection = True

    def abort(self) -> None:
        """Reset the TCP connection; no greenlet may be reading from it."""
        self.close_connection = True
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.socket.close()

    def _exchange(self) -> None:
        """Answer a request of LM Studio's API; record request and response as on the wire."""
        self.record = record = {
            "id": next(_ids), "method": self.command, "target": self.path,
            "headers": list(self.headers.items()), "body": b"", "bodyLength": 0, "bodySha256": "",
            "startedMs": time.time() * 1000, "endedMs": None, "outcome": "running",
            "status": None, "sentHeaders": [], "sent": bytearray(),
        }  # fmt: skip
        self.simulator.records.append(record)
        outcome, watcher = "client_gone", gevent.Greenlet(self._watch, gevent.getcurrent())
        try:
            body = self.wsgi_input.read()
            record |= {"bodyLength": len(body), "bodySha256": sha256(body).hexdigest()}
            record["body"] = body if len(body) <= _BODY_LIMIT else b""
            watcher.start()
            outcome = self._answer(body)
        except ConnectionAbortedError:  # raised below, by a fault
            outcome = "fault"
            watcher.kill()
            self.abort()
        finally:
            watcher.kill()
            record |= {"endedMs": time.time() * 1000, "outcome": outcome}

    def _watch(self, owner: gevent.Greenlet[..., object]) -> None:
        """Kill the greenlet that answers as soon as the client closes its connection."""
        with suppress(OSError, ValueError):
            # peek() leaves a pipelined request in the buffer and, unlike MSG_PEEK, works with TLS
            if self.rfile.peek(1):
                return
        owner.kill(block=False)

    def _answer(self, body: bytes) -> str:
        """Answer the request with the faults and pace of its headers; return the outcome."""
        while self.simulator.switches.silent_http and self.path.startswith(("/v1/", "/lmstudio-")):
            gevent.sleep(0.02)
        names = self.headers.get("X-Simulator-Fault", "").split(",")
        self.faults = {name.strip() for name in names} - {""}
        self.pace = float(self.headers.get("X-Simulator-Pace-Ms", self.simulator.pace_ms)) / 1000
        self.head_delay = float(self.headers.get("X-Simulator-Head-Delay-Ms", 0)) / 1000
        gevent.sleep(float(self.headers.get("X-Simulator-Prefill-Ms", 0)) / 1000)
        if "close-before-head" in self.faults:
            raise ConnectionAbortedError
        replaced = [_REPLACEMENTS[name] for name in self.faults if name in _REPLACEMENTS]
        if "garbage-head" in self.faults:
            self.close_connection = True
            self.socket.sendall(b"\x16\x03 this is no HTTP \xff\r\n\r\n")
        elif unknown := self.faults - _BREAKING - _SHAPING:  # a typo must not let a test pass
            self._deliver(error_response(400, f"Unknown fault: {', '.join(sorted(unknown))}"))
        else:
            self._deliver(replaced[0] if replaced else self._respond(body))
        return "fault" if self.faults & _BREAKING else "complete"

    def _respond(self, body: bytes) -> Response:
        request = Request(self.command, self.path, self.headers, body, self.faults, self.pace)
        return respond(self.simulator, request)

    def _deliver(self, response: Response) -> None:
        """Send the response in the shape that the faults ask for."""
        faults, chunked = self.faults, False
        headers = {"Content-Type": "application/json; charset=utf-8", **response.headers}
        if "gzip" in faults:
            headers["Content-Encoding"] = "gzip"
        if isinstance(response.content, tuple):
            headers["Content-Type"] = "text/event-stream"
            chunked = self.request_version == "HTTP/1.1"
            headers |= {"Transfer-Encoding": "chunked"} if chunked else {"Connection": "close"}
            writes = _shaped(faults, self._interrupted(response.content))
        else:
            body = encoded(response.content)
            if isinstance(response.content, str):
                headers["Content-Type"], body = "text/html", response.content.encode()
            body = gzip.compress(body) if "gzip" in faults else body
            writes = iter([body] if self.command != "HEAD" else [])
            length = {"Content-Length": str(len(body) + 100 * ("break-plain" in faults))}
            headers |= {"Connection": "close"} if "no-length" in faults else length
        if headers.get("Connection") == "close" or "break-plain" in faults:
            self.close_connection = True
        self.record |= {"status": response.status, "sentHeaders": list(headers.items())}
        lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}"]
        lines += [f"{name}: {text}" for name, text in headers.items()]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode())
        gevent.sleep(self.head_delay)
        sent = self.record["sent"]
        for write in chain(writes, [b""] if chunked else []):
            sent += write[: _BODY_LIMIT - len(sent)]
            self.socket.sendall(b"%x\r\n%b\r\n" % (len(write), write) if chunked else write)

    def _interrupted(self, reply: Reply) -> Iterator[bytes]:
        """Yield the reply's events at the pace, up to their end or to the fault."""
        fault = next(iter(self.faults & _ENDS.keys()), None)
        unpaced = self.faults & {"one-chunk", "split-bytes"}
        _, opening, tokens, closing = reply
        yield from opening
        for token in islice(tokens, 3 if fault else None):
            yield token
            if not unpaced:
                gevent.sleep(self.pace)
        if fault == "break-stream":
            raise ConnectionAbortedError
        if fault == "silent-stream":
            gevent.sleep(86400)
        yield from [_ENDS[fault].encode()] if fault else closing


def _shaped(faults: set[str], events: Iterator[bytes]) -> Iterator[bytes]:
    """Turn events into the bytes of each write."""
    if "crlf" in faults:
        events = (event.replace(b"\n", b"\r\n") for event in events)
    if "gzip" in faults:  # flushed after each event, so that a client can read it on arrival
        compressor = zlib.compressobj(wbits=31)
        zipped = (
            compressor.compress(event) + compressor.flush(zlib.Z_SYNC_FLUSH) for event in events
        )
        events = chain(zipped, (compressor.flush() for _ in range(1)))
    if "one-chunk" in faults:
        events = iter([b"".join(events)])
    if "split-bytes" in faults:
        events = (bytes([byte]) for byte in chain.from_iterable(events))
    return events


def serve(host: str, port: int, tls_cert: str, tls_key: str, **simulated: Any) -> None:
    """Listen, print the URL, and serve until SIGINT or SIGTERM; OSError if it can't listen."""
    options: dict[str, Any] = {"backlog": 4096, "log": None, "error_log": None}
    if tls_cert:
        options["ssl_context"] = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        options["ssl_context"].load_cert_chain(tls_cert, tls_key)
    simulator = Simulator(**simulated)
    server = WSGIServer((host, port), simulator, handler_class=Handler, **options)
    stopped = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, stopped.set)
    server.start()
    scheme, name = "https" if tls_cert else "http", f"[{host}]" if ":" in host else host
    print(f"LM Studio simulator listening on {scheme}://{name}:{server.server_port}", flush=True)
    stopped.wait()
    server.stop(timeout=0)
