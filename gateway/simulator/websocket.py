"""LM Studio's SDK protocol: calls and channels over one WebSocket per namespace.

Shapes follow ``lmstudio/json_api.py`` and ``_sdk_models`` (1.5.0) and lmstudio.md section 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import gevent
from gevent.lock import RLock
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    CloseConnection,
    Event,
    Ping,
    Request,
    TextMessage,
)
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from gateway.simulator.calls import Calls, Violation
from gateway.simulator.catalogue import JsonObject, Model
from gateway.simulator.memory import LoadRequest, Refusal
from gateway.simulator.state import Simulator

if TYPE_CHECKING:
    from gateway.simulator.server import Handler

NAMESPACES = frozenset(
    {"llm", "embedding", "system", "files", "repository", "diagnostics", "plugins", "runtime"}
)


class Dropped(gevent.GreenletExit):  # type: ignore[misc]  # gevent has no types here
    """Ends the greenlet of a socket that a test cuts."""


class Session:
    """One WebSocket, from the upgrade to its end."""

    def __init__(self, simulator: Simulator, handler: Handler, namespace: str) -> None:
        self.namespace = namespace
        self._simulator = simulator
        self._handler = handler
        self._calls = Calls(simulator, namespace)
        self._greenlet: gevent.Greenlet[..., Any] = gevent.getcurrent()
        self._connection = WSConnection(ConnectionType.SERVER)
        self._sending = RLock()  # frames of parallel loads must not mix
        self._channels: dict[int, gevent.Greenlet[..., Any]] = {}

    def serve(self) -> None:
        """Talk until either side ends it; running loads are cancelled then."""
        self._simulator.sessions.add(self)
        self._simulator.opened[self.namespace] += 1
        try:
            self._upgrade()
            frames = self._frames()
            if self._authenticate(frames):
                for frame in frames:
                    self._dispatch(frame)
        except Dropped:
            self._handler.abort()
        except (OSError, RemoteProtocolError):
            pass  # the client is gone
        finally:
            self._simulator.sessions.discard(self)
            gevent.killall(list(self._channels.values()), block=False)

    def drop(self) -> None:
        """Cut the TCP connection with a reset, from any greenlet."""
        self._greenlet.kill(Dropped, block=False)

    def send(self, message: JsonObject) -> None:
        """Send one JSON frame."""
        self._send_event(TextMessage(data=json.dumps(message)))

    def _send_event(self, event: Event) -> None:
        with self._sending:
            try:
                payload = self._connection.send(event)
            except LocalProtocolError as error:
                raise ConnectionError("the socket is closing") from error
            self._handler.socket.sendall(payload)

    def _upgrade(self) -> None:
        headers = [(name.encode(), value.encode()) for name, value in self._handler.headers.items()]
        self._connection.initiate_upgrade_connection(headers, self._handler.path)
        for event in self._connection.events():
            if isinstance(event, Request):
                self._send_event(AcceptConnection())

    def _frames(self) -> Iterator[Any]:
        """Yield the JSON of each complete text message; answer pings and the closing handshake."""
        text = ""
        while data := self._handler.rfile.read1(65536):
            self._connection.receive_data(data)
            for event in self._connection.events():
                if isinstance(event, TextMessage):
                    text += event.data
                    if event.message_finished:
                        yield _decoded(text)
                        text = ""
                elif isinstance(event, Ping):
                    self._send_event(event.response())
                elif isinstance(event, CloseConnection):
                    self._send_event(event.response())
                    return

    def _authenticate(self, frames: Iterator[Any]) -> bool:
        """Answer the first frame; a token ``sk-lm-ID:KEY`` is matched as identifier and passkey."""
        hello = next(frames, None)
        if self._simulator.faults.switches.silent_after_upgrade:
            for _ in frames:  # never answered, not even when the switch is off again
                pass
            return False
        if hello is None:
            return False
        if not isinstance(hello, dict) or hello.get("authVersion") != 1:
            return self._turn_away("Invalid authentication message.")
        shown = f"sk-lm-{hello.get('clientIdentifier')}:{hello.get('clientPasskey')}"
        if self._simulator.token not in (None, shown):
            return self._turn_away("Invalid API token.")
        self._simulator.clients.append(str(hello.get("clientIdentifier")))
        self.send({"success": True})
        return True

    def _turn_away(self, reason: str) -> bool:
        self.send({"success": False, "error": reason})
        self._send_event(CloseConnection(code=1000))
        return False

    def _dispatch(self, frame: Any) -> None:
        """Handle a frame; one that violates a schema only gets a warning, without a call id."""
        try:
            self._route(frame)
        except Violation as violation:
            self._warn(violation)

    def _warn(self, violation: Violation) -> None:
        warning = f"Received communication that violates the protocol: {violation}"
        self._simulator.warnings.append(warning)
        self.send({"type": "communicationWarning", "warning": warning})

    def _route(self, frame: Any) -> None:
        match frame:
            case {"type": "rpcCall", "endpoint": str(), "callId": int()}:
                self._call(frame)
            case {"type": "channelCreate", "endpoint": str(), "channelId": int()}:
                self._open_channel(frame)
            case {"type": "channelSend", "channelId": int(number), "message": message}:
                if message == {"type": "cancel"} and number in self._channels:
                    self._channels[number].kill(block=False)
            case {"type": "channelAck"}:
                pass
            case {"type": "keepAlive"}:
                self.send({"type": "keepAliveAck"})
            case _:
                raise Violation(f"unknown message: {json.dumps(frame)}")

    def _call(self, frame: JsonObject) -> None:
        endpoint = self._calls.endpoints().get(frame["endpoint"])
        if endpoint is None:
            raise Violation(f"unknown RPC endpoint {self.namespace}.{frame['endpoint']}")
        if self._simulator.faults.switches.silent_rpc:
            return
        if delay := self._simulator.faults.switches.slow_rpc_ms:
            gevent.spawn_later(delay / 1000, self._answer_late, endpoint, frame)
        else:
            self._answer(endpoint, frame)

    def _answer_late(self, endpoint: Callable[[Any], Any], frame: JsonObject) -> None:
        with suppress(OSError):  # the socket may have closed meanwhile
            self._answer(endpoint, frame)

    def _answer(self, endpoint: Callable[[Any], Any], frame: JsonObject) -> None:
        reply: JsonObject = {"callId": frame["callId"]}
        try:
            result = endpoint(frame.get("parameter"))
            reply |= {"type": "rpcResult"} | ({} if result is None else {"result": result})
        except Violation as violation:
            self._warn(violation)
            return
        except Refusal as refusal:
            reply |= {"type": "rpcError", "error": refusal.as_json()}
        self.send(reply)

    def _open_channel(self, frame: JsonObject) -> None:
        loads = {"loadModel": self._load, "getOrLoad": self._get_or_load}
        work = loads.get(frame["endpoint"])
        if work is None or self.namespace not in ("llm", "embedding"):
            raise Violation(f"unknown channel endpoint {self.namespace}.{frame['endpoint']}")
        key = "modelKey" if frame["endpoint"] == "loadModel" else "identifier"
        request = self._calls.load_request(frame.get("creationParameter"), key)
        number = frame["channelId"]
        self._channels[number] = gevent.spawn(self._run_channel, number, work, request)
        gevent.sleep(0)  # let it begin: one killed before it ran could not answer a cancel

    def _run_channel(
        self,
        number: int,
        work: Callable[[LoadRequest, Callable[[JsonObject], None]], None],
        request: LoadRequest,
    ) -> None:
        def tell(message: JsonObject) -> None:
            self.send({"type": "channelSend", "channelId": number, "message": message})

        def fail(refusal: Refusal) -> None:
            error = refusal.as_json()
            self.send({"type": "channelError", "channelId": number, "error": error})

        try:
            try:
                work(request, tell)
                self.send({"type": "channelClose", "channelId": number})
            except Refusal as refusal:
                fail(refusal)
            except gevent.GreenletExit:
                if self in self._simulator.sessions:
                    fail(Refusal("Failed to load model", cause="Operation canceled."))
        except OSError:
            pass  # the socket closed meanwhile
        finally:
            self._channels.pop(number, None)

    def _load(self, request: LoadRequest, tell: Callable[[JsonObject], None]) -> None:
        def resolved(model: Model, identifier: str) -> None:
            tell({"type": "resolved", "info": model.info()})

        def progressed(progress: float) -> None:
            tell({"type": "progress", "progress": progress})

        instance = self._simulator.memory.load(request, resolved, progressed)
        tell({"type": "success", "info": instance.info()})

    def _get_or_load(self, request: LoadRequest, tell: Callable[[JsonObject], None]) -> None:
        def resolved(model: Model, identifier: str) -> None:
            tell({"type": "startLoading", "identifier": identifier, "info": model.info()})

        def progressed(progress: float) -> None:
            tell({"type": "loadProgress", "progress": progress})

        for instance in self._simulator.memory.of(self.namespace):
            if instance.identifier == request.model_key:
                tell(
                    {
                        "type": "alreadyLoaded",
                        "identifier": instance.identifier,
                        "info": instance.info(),
                    }
                )
                return
        instance = self._simulator.memory.load(request, resolved, progressed)
        tell({"type": "loadSuccess", "info": instance.info()})


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # no message: it will be warned about
