"""LM Studio's SDK protocol: calls and loads over a WebSocket, shaped as in ``lmstudio`` 1.5.0."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from email.message import Message
from io import BufferedReader
from itertools import cycle
from typing import Any, Protocol

import gevent
from gevent.lock import RLock
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Event, Ping, TextMessage
from wsproto.utilities import ProtocolError

from gateway.simulator.models import MODELS, UNFAMILIAR_MODELS, Instance, JsonObject, Refusal
from gateway.simulator.state import Simulator

#: Frames that a later LM Studio might send, and some that none should.
_ODD_FRAMES = (
    *('{"type": "announcement", "text": "new"}', '{"type": "rpcProgress", "callId": 1}'),
    *('{"type": "channelSend", "channelId": "x", "message": {}}', '{"channelId": [1]}', "{}"),
    *("null", "7", "[]", "no JSON"),
)
#: What ``progress`` is while a load reports no numbers from 0 to 1.
_ODD_PROGRESS: tuple[Any, ...] = (None, "half", float("nan"), True, [], -1, 0.5, 7, float("inf"))


class Dropped(gevent.GreenletExit):  # type: ignore[misc]  # gevent has no types here
    """Raised in the greenlet of a socket that a test drops."""


class Connection(Protocol):
    """The HTTP connection that a session takes over, whose request head has been read."""

    path: str
    headers: Message
    socket: socket.socket
    rfile: BufferedReader

    def abort(self) -> None:
        """Reset the TCP connection."""


class Session:
    """One WebSocket, from the upgrade to its end."""

    def __init__(self, simulator: Simulator, http: Connection) -> None:
        self.namespace = http.path.partition("?")[0].strip("/")
        self._simulator, self._http = simulator, http
        self._greenlet = gevent.getcurrent()
        self._connection = WSConnection(ConnectionType.SERVER)
        self._sending = RLock()  # frames of parallel loads must not mix
        self._loads: dict[int, Instance] = {}  # by channel

    def drop(self) -> None:
        """Reset the TCP connection, from any greenlet."""
        self._greenlet.kill(Dropped, block=False)

    def serve(self) -> None:
        """Exchange messages until either side closes; loads in progress are cancelled then."""
        self._simulator.sockets.add(self)
        self._simulator.opened[self.namespace] += 1
        try:
            headers = [(key.encode(), text.encode()) for key, text in self._http.headers.items()]
            self._connection.initiate_upgrade_connection(headers, self._http.path)
            self._send_event(AcceptConnection())
            messages = self._messages()
            if self._authenticate(messages):
                for message in messages:
                    self._handle(message)
        except Dropped:
            self._http.abort()
        except (OSError, ProtocolError, ValueError):
            pass  # the client disconnected or sent no JSON
        finally:
            self._simulator.sockets.discard(self)
            for load in self._loads.values():
                load.cancel()

    def _send(self, **message: Any) -> None:
        self._send_event(TextMessage(data=json.dumps(message)))

    def _send_event(self, event: Event) -> None:
        with self._sending:
            self._http.socket.sendall(self._connection.send(event))

    def _messages(self) -> Iterator[Any]:
        """Yield the JSON of each message; answer pings and the closing handshake."""
        text = ""
        while data := self._http.rfile.read1(65536):
            self._connection.receive_data(data)
            for event in self._connection.events():
                if isinstance(event, Ping | CloseConnection):
                    self._send_event(event.response())
                if isinstance(event, CloseConnection):
                    return
                if isinstance(event, TextMessage):
                    text += event.data
                    if event.message_finished:
                        yield json.loads(text)
                        text = ""

    def _authenticate(self, messages: Iterator[Any]) -> bool:
        """Answer the first message; a token ``sk-lm-ID:KEY`` is sent as identifier and passkey."""
        hello, token = next(messages, None), self._simulator.token
        if self._simulator.switches.silent_after_upgrade:
            # keeps reading, and stays silent even once the switch is off
            return any(False for _ in messages)
        match hello:
            case {"authVersion": 1, "clientIdentifier": name, **more}:
                if token in (None, f"sk-lm-{name}:{more.get('clientPasskey')}"):
                    self._simulator.clients.append(str(name))
                    self._send(success=True)
                    return True
        self._send(success=False, error="Invalid authentication message or API token.")
        self._send_event(CloseConnection(code=1000))
        return False

    def _handle(self, message: Any) -> None:
        match message:
            case {"type": "rpcCall", "endpoint": str(endpoint), "callId": int(number), **more}:
                if not self._simulator.switches.silent_rpc:
                    replies = self._call(number, endpoint, more.get("parameter"))
                    gevent.spawn(self._answer, replies, type="rpcError", callId=number)
            case {"type": "channelCreate", "endpoint": "loadModel", "channelId": int(number)}:
                replies = self._load(number, message.get("creationParameter"))
                gevent.spawn(self._answer, replies, type="channelError", channelId=number)
                gevent.sleep(0)  # let the load begin, so that the next message can cancel it
            case {"type": "channelSend" | "channelAck", "channelId": int(number), **more}:
                if more.get("message") == {"type": "cancel"} and number in self._loads:
                    self._loads[number].cancel()
            case {"type": "keepAlive"}:
                self._send(type="keepAliveAck")
            case _:
                self._warn(message)

    def _warn(self, *what: object) -> None:
        """Warn about a message that LM Studio's schemas reject, without naming its call."""
        warning = f"Received communication that violates the protocol: {json.dumps(what)}"
        self._simulator.warnings.append(warning)
        self._send(type="communicationWarning", warning=warning)

    def _answer(self, replies: Iterator[JsonObject], **failure: Any) -> None:
        """Send the replies, or the error that ends them, unless the socket has closed."""
        with suppress(OSError, ProtocolError):
            try:
                for reply in replies:
                    for frame in _ODD_FRAMES if self._simulator.switches.odd_frames else ():
                        self._send_event(TextMessage(data=frame))
                    self._send(**reply)
            except Refusal as refusal:
                self._send(**failure, error=refusal.error)

    def _load(self, number: int, parameter: Any) -> Iterator[JsonObject]:
        """Load a model on a channel; a TTL is a whole number of ms, at least 1."""
        try:
            parts = [layer["config"]["fields"] for layer in parameter["loadConfigStack"]["layers"]]
            fields = {one["key"]: one.get("value") for part in parts for one in part}
            name, ttl = parameter.get("identifier") or "", parameter.get("ttlMs")
            new = Instance(self.namespace, parameter["modelKey"], name, fields, ttl)
            if not isinstance(name, str) or not (ttl is None or (type(ttl) is int and ttl >= 1)):
                raise ValueError
        except (KeyError, TypeError, AttributeError, ValueError):
            return self._warn(parameter)
        self._loads[number] = new
        switches = self._simulator.switches
        seconds, odd = switches.load_ms / 1000, cycle(_ODD_PROGRESS)
        for message in self._simulator.memory.load(new, switches.fail_loads, seconds):
            if switches.close_loads and message["type"] == "success":
                break
            if switches.odd_progress and message["type"] == "progress":
                message["progress"] = next(odd)
            yield {"type": "channelSend", "channelId": number, "message": message}
        yield {"type": "channelClose", "channelId": number}

    def _call(self, number: int, endpoint: str, parameter: Any) -> Iterator[JsonObject]:
        """Make a call of the namespace ``system``, or of one for models."""
        memory, space = self._simulator.memory, self.namespace
        switches = self._simulator.switches
        result: Any = None
        if switches.refuse_rpc == endpoint:
            raise Refusal("The call was refused", "It is a bad day.")
        match "model" if space in ("llm", "embedding") else space, endpoint, parameter:
            case "system", "version", None:
                result = {"version": "0.3.31", "build": 1}
            case "system", "listDownloadedModels", None:
                unfamiliar = self._simulator.switches.unknown_model_type
                result = [*MODELS.values(), *(UNFAMILIAR_MODELS if unfamiliar else [])]
            case "model", "listLoaded", None:
                result = [instance.info() for instance in memory.of(space)]
            case "model", "getModelInfo", {"specifier": dict(specifier), **more}:
                with suppress(*[] if more.get("throwIfNotFound") else [Refusal]):
                    result = memory.find(space, specifier).info()
            case "model", "getLoadConfig", {"specifier": dict(specifier)}:
                config = memory.find(space, specifier).config
                result = {"fields": [{"key": key, "value": config[key]} for key in config]}
            case "model", "unloadModel", {"identifier": str(name)}:
                memory.find(space, {"query": {"identifier": name}}, "generic.identifierNotFound")
                del memory.instances[name]
            case _:
                return self._warn(space, endpoint, parameter)
        if switches.silent_endpoint == endpoint:
            return
        given = {} if result is None else {"result": result}
        yield {"type": "rpcResult", "callId": number, **given}
