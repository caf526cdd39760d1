"""One port for everything: gevent's HTTP server, with WebSocket upgrades and optional TLS."""

from __future__ import annotations

import signal
import socket
import ssl
import struct
import sys
import traceback
from typing import Any

import gevent
from gevent.event import Event
from gevent.pywsgi import WSGIHandler, WSGIServer

from gateway.simulator.control import PREFIX, control
from gateway.simulator.delivery import deliver, error_answer
from gateway.simulator.exchange import Exchange, Reset
from gateway.simulator.faults import Knobs
from gateway.simulator.http_api import respond
from gateway.simulator.journal import Record
from gateway.simulator.state import Simulator
from gateway.simulator.websocket import NAMESPACES, Session

#: Seconds after which LM Studio (node's default) closes an idle connection.
KEEP_ALIVE = 5.0
_FIRST_REQUEST = 60.0
_BACKLOG = 4096


class Handler(WSGIHandler):  # type: ignore[misc]  # gevent has no types here
    """One connection. gevent parses the requests; the answers are written raw, not by WSGI."""

    def __init__(self, sock: Any, address: Any, server: Server, rfile: Any = None) -> None:
        super().__init__(sock, address, server, rfile)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._simulator = server.simulator
        self._patience = _FIRST_REQUEST

    def read_requestline(self) -> str:
        """Wait for the next request, but not longer than the keep-alive time."""
        self.socket.settimeout(self._patience)
        self._patience = KEEP_ALIVE
        line: str = super().read_requestline()
        self.socket.settimeout(None)
        return line

    def handle_one_response(self) -> None:
        """Answer the request that was just parsed."""
        try:
            if self.headers.get("Upgrade", "").lower() == "websocket":
                self._upgrade()
            elif self.path.startswith(PREFIX):
                self._control()
            else:
                self._exchange()
        except OSError:
            self.close_connection = True
        except Exception:
            traceback.print_exc(file=sys.stderr)  # a fault of the simulator itself
            self.close_connection = True

    def abort(self) -> None:
        """Reset the TCP connection; nothing may be reading from it."""
        self.close_connection = True
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.socket.close()

    def _upgrade(self) -> None:
        self.close_connection = True
        namespace = self.path.partition("?")[0].strip("/")
        if self._simulator.faults.switches.refuse_websockets:
            self._refuse_upgrade("503 Service Unavailable")
        elif namespace not in NAMESPACES:
            self._refuse_upgrade("404 Not Found")
        else:
            Session(self._simulator, self, namespace).serve()

    def _refuse_upgrade(self, status: str) -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        self.socket.sendall(head.encode())

    def _control(self) -> None:
        body = self.wsgi_input.read()
        exchange = Exchange(self, Record(0, self.command, self.path, []), body)
        answer = control(self._simulator, self.command, self.path, body)
        deliver(exchange, Knobs(pace=0), lambda: answer)

    def _exchange(self) -> None:
        """Record and answer one request of LM Studio's API."""
        journal = self._simulator.journal
        record = journal.open(self.command, self.path, list(self.headers.items()))
        outcome = "client_gone"
        try:
            record.keep_body(body := self.wsgi_input.read())
            exchange = Exchange(self, record, body)
            with exchange.watched():
                spoiled = self._answer(exchange)
            outcome = "fault" if spoiled else "complete"
        except Reset:
            outcome = "fault"
            self.abort()
        finally:
            journal.close(record, outcome)

    def _answer(self, exchange: Exchange) -> bool:
        """Deliver the answer; say whether a fault spoiled it."""
        simulator = self._simulator
        if exchange.path.startswith(("/v1/", "/lmstudio-greeting")):
            simulator.faults.http_open.wait()
        try:
            knobs = Knobs.from_headers(exchange.header, simulator.pace_ms)
        except ValueError as error:
            refusal = error_answer(400, str(error))
            deliver(exchange, Knobs(pace=0), lambda: refusal)
            return False
        deliver(exchange, knobs, lambda: respond(simulator, exchange, knobs))
        return knobs.spoiled


def _no_application(environ: object, start_response: object) -> None:
    """Stand where gevent wants a WSGI application; :class:`Handler` never calls it."""


class Server(WSGIServer):  # type: ignore[misc]  # gevent has no types here
    """The listening server; quiet about clients that go away."""

    handler_class = Handler

    def __init__(self, simulator: Simulator, address: tuple[str, int], **options: Any) -> None:
        super().__init__(
            address, _no_application, backlog=_BACKLOG, log=None, error_log=None, **options
        )
        self.simulator = simulator

    def wrap_socket_and_handle(self, client_socket: Any, address: Any) -> None:
        """Do the TLS handshake; one that fails is the client's affair."""
        try:
            super().wrap_socket_and_handle(client_socket, address)
        except OSError:
            client_socket.close()


def serve(
    simulator: Simulator, host: str, port: int, tls_cert: str | None, tls_key: str | None
) -> None:
    """Listen, say where, and serve until SIGINT or SIGTERM."""
    options = {}
    if tls_cert:
        options["ssl_context"] = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        options["ssl_context"].load_cert_chain(tls_cert, tls_key)
    server = Server(simulator, (host, port), **options)
    stopped = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, stopped.set)
    server.start()
    scheme = "https" if tls_cert else "http"
    name = f"[{host}]" if ":" in host else host
    print(f"LM Studio simulator listening on {scheme}://{name}:{server.server_port}", flush=True)
    stopped.wait()
    server.stop(timeout=0)
