"""One port for everything: HTTP with its faults, WebSocket upgrades, TLS, and control paths.

Tests steer and question the simulator below ``/_simulator/`` (see ``Simulator.control``) and with
headers of a request: ``X-Simulator-Fault`` (names of the tables here, with commas between them),
``X-Simulator-Pace-Ms`` (between two tokens), ``-Prefill-Ms`` and ``-Head-Delay-Ms``.
"""

from __future__ import annotations

import gzip
import json
import signal
import socket
import ssl
import struct
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from http import HTTPStatus
from itertools import chain, count, islice
from typing import Any, get_type_hints
from urllib.parse import parse_qs

import gevent
from gevent.event import Event
from gevent.pywsgi import WSGIHandler, WSGIServer

from gateway.simulator.http_api import Answer, Reply, encoded, failure, respond
from gateway.simulator.models import JsonObject, Memory
from gateway.simulator.websocket import Session

#: Bodies beyond this many bytes are recorded as length and digest only; answers are cut there.
_BODY_LIMIT = 1 << 20
_CRASH = "The model has crashed without additional information. (Exit code: 6)"
_BUSY = failure(429, "Too many requests.", type="requests", code="rate_limit_exceeded")
_BUSY.headers["Retry-After"] = "1"
#: Faults that replace the answer.
_REPLACEMENTS = {
    "refuse-500": Answer("<html><body><h1>500 Internal Server Error</h1></body></html>", 500),
    "error-string-500": Answer({"error": _CRASH}, 500),
    "status-429": _BUSY,
    "error-200": Answer({"error": _CRASH}),
    "error-200-object": failure(200, _CRASH),
    "error-200-stream": Answer({"error": _CRASH}),
}
#: Faults that end a stream after three tokens, and with what.
_ENDS = {
    "break-stream": "",
    "silent-stream": "",
    "error-in-stream-event": f'event: error\ndata: {{"error": {{"message": "{_CRASH}"}}}}\n\n',
    "error-in-stream-data": f'data: {{"error": "{_CRASH}"}}\n\n',
}
#: Faults that spoil the answer, so that the exchange is recorded with the outcome ``fault``.
_SPOILING = {*_REPLACEMENTS, *_ENDS, "close-before-head", "garbage-head", "break-plain"}
#: Faults that only change how a right answer travels.
_SHAPING = {"gzip", "split-bytes", "crlf", "big-answer", "one-chunk", "no-length"}
_ids = count(1)


@dataclass
class Switches:
    """The faults of ``POST /_simulator/faults``; every field is one switch."""

    refuse_websockets: bool = False  #: 503 to every WebSocket upgrade
    silent_after_upgrade: bool = False  #: the authentication frame is never answered
    silent_rpc: bool = False  #: no RPC is answered
    silent_http: bool = False  #: ``/v1`` and the greeting hang until this is off
    fail_loads: str | None = None  #: every load fails with this cause
    load_ms: int = 0  #: how long a load takes, if not as long as its model's size says
    unknown_model_type: bool = False  #: two models that the SDK's types don't know are listed


class Simulator:
    """Everything that one running simulator knows; ``pace_ms`` is the time between two tokens."""

    def __init__(self, token: str | None, pace_ms: float) -> None:
        self.token, self.pace_ms = token or None, pace_ms
        self.sessions: set[Session] = set()
        self._reset()

    def control(self, method: str, target: str, body: bytes) -> Answer:
        """Answer one control request."""
        path, _, query = target.partition("?")
        match method, path.removeprefix("/_simulator/"):
            case "POST", "faults":
                wanted, kinds = json.loads(body), get_type_hints(Switches)
                if wanted.pop("drop_sockets", False):
                    for session in list(self.sessions):
                        session.drop()
                for name, value in wanted.items():
                    if name not in kinds or not isinstance(value, kinds[name]):
                        return Answer({"error": f"no such fault, or a bad value: {name}"}, 400)
                vars(self.switches).update(wanted)
                return Answer(vars(self.switches))
            case "POST", "reset":
                for load in self.memory.loads:
                    load.cancel()
                self._reset()
                return Answer({})
            case "GET", "state":
                state = {
                    "loaded": [vars(one) for one in self.memory.instances.values()],
                    "loads": [vars(one) for one in self.memory.loads],
                    "sockets": Counter(session.namespace for session in self.sessions),
                    "socketsOpened": self.opened,
                    "warnings": list(self.warnings),
                    "clients": list(self.clients),
                }
                return Answer(state)
            case "GET", "requests":
                since = int(parse_qs(query).get("since", ["0"])[0])
                return Answer({"requests": [one for one in self.records if one["id"] > since]})
        return Answer({"error": f"no such control path: {method} {path}"}, 404)

    def _reset(self) -> None:
        """Switch faults off, unload everything and clear the records; sockets stay open."""
        self.switches, self.memory = Switches(), Memory()
        self.records: deque[JsonObject] = deque(maxlen=2000)  # see Handler._exchange
        self.warnings: deque[str] = deque(maxlen=1000)
        self.clients: deque[str] = deque(maxlen=1000)
        self.opened = Counter(session.namespace for session in self.sessions)


class Handler(WSGIHandler):  # type: ignore[misc]  # gevent has no types here
    """One connection. gevent parses the requests; the answers are written raw, not by WSGI."""

    _patience = 60.0

    def read_requestline(self) -> str:
        """Wait for the next request, but only 5 s once one was answered, as LM Studio does."""
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(self._patience)
        self._patience = 5.0
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
                self._deliver(Answer({}, 503, Connection="close"))
            else:
                self.close_connection = True
                Session(self).serve()
        except OSError:
            self.close_connection = True

    def abort(self) -> None:
        """Reset the TCP connection; nothing may be reading from it."""
        self.close_connection = True
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.socket.close()

    def _exchange(self) -> None:
        """Answer a request of LM Studio's API, and record all of it as it is on the wire."""
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
        except ConnectionAbortedError:  # the fault that was asked for
            outcome = "fault"
            watcher.kill()
            self.abort()
        finally:
            watcher.kill()
            record |= {"endedMs": time.time() * 1000, "outcome": outcome}

    def _watch(self, owner: gevent.Greenlet[..., object]) -> None:
        """Kill the greenlet that answers as soon as the client closes its connection."""
        with suppress(OSError, ValueError):
            # A peek leaves a pipelined request in the buffer, and unlike MSG_PEEK works with TLS.
            if self.rfile.peek(1):
                return
        owner.kill(block=False)

    def _answer(self, body: bytes) -> str:
        """Answer the request as its headers want it, and return the outcome."""
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
        elif unknown := self.faults - _SPOILING - _SHAPING:  # or a typing error lets a test pass
            self._deliver(failure(400, f"no such fault: {', '.join(sorted(unknown))}"))
        else:
            self._deliver(replaced[0] if replaced else respond(self, body))
        return "fault" if self.faults & _SPOILING else "complete"

    def _deliver(self, answer: Answer) -> None:
        """Send the answer in the way that the faults want it."""
        faults, chunked = self.faults, False
        headers = {"Content-Type": "application/json; charset=utf-8", **answer.headers}
        if "gzip" in faults:
            headers["Content-Encoding"] = "gzip"
        if isinstance(answer.content, tuple):
            headers["Content-Type"] = "text/event-stream"
            chunked = self.request_version == "HTTP/1.1"
            headers |= {"Transfer-Encoding": "chunked"} if chunked else {"Connection": "close"}
            writes = _shaped(faults, self._interrupted(answer.content))
        else:
            body = encoded(answer.content)
            if isinstance(answer.content, str):
                headers["Content-Type"], body = "text/html", answer.content.encode()
            body = gzip.compress(body) if "gzip" in faults else body
            writes = iter([body] if self.command != "HEAD" else [])
            length = {"Content-Length": str(len(body) + 100 * ("break-plain" in faults))}
            headers |= {"Connection": "close"} if "no-length" in faults else length
        if headers.get("Connection") == "close" or "break-plain" in faults:
            self.close_connection = True
        self.record |= {"status": answer.status, "sentHeaders": list(headers.items())}
        lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
        lines += [f"{name}: {text}" for name, text in headers.items()]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode())
        gevent.sleep(self.head_delay)
        sent = self.record["sent"]
        for write in chain(writes, [b""] if chunked else []):
            sent += write[: _BODY_LIMIT - len(sent)]
            self.socket.sendall(b"%x\r\n%b\r\n" % (len(write), write) if chunked else write)

    def _interrupted(self, reply: Reply) -> Iterator[bytes]:
        """Yield the reply's events, paced, until their end or the fault that was asked for."""
        fault = next(iter(self.faults & _ENDS.keys()), None)
        hurried = self.faults & {"one-chunk", "split-bytes"}
        _, opening, tokens, closing = reply
        yield from opening
        for token in islice(tokens, 3 if fault else None):
            yield token
            if not hurried:
                gevent.sleep(self.pace)
        if fault == "break-stream":
            raise ConnectionAbortedError
        if fault == "silent-stream":
            gevent.sleep(86400)
        yield from [_ENDS[fault].encode()] if fault else closing


def _shaped(faults: set[str], events: Iterator[bytes]) -> Iterator[bytes]:
    """Turn events into the byte strings of the single writes."""
    if "crlf" in faults:
        events = (event.replace(b"\n", b"\r\n") for event in events)
    if "gzip" in faults:  # event by event, so that each can be read when it arrives
        squeeze = zlib.compressobj(wbits=31)
        zipped = (squeeze.compress(event) + squeeze.flush(zlib.Z_SYNC_FLUSH) for event in events)
        events = chain(zipped, (squeeze.flush() for _ in range(1)))
    if "one-chunk" in faults:
        events = iter([b"".join(events)])
    if "split-bytes" in faults:
        events = (bytes([byte]) for byte in chain.from_iterable(events))
    return events


def serve(host: str, port: int, tls_cert: str, tls_key: str, **simulated: Any) -> None:
    """Listen, say where, and serve until SIGINT or SIGTERM."""
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
