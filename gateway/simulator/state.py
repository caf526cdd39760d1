"""The state of a running simulator: its switches, models, sockets and records."""

from __future__ import annotations

import json
from collections import Counter, deque
from dataclasses import dataclass
from typing import Protocol, get_type_hints
from urllib.parse import parse_qs

from gateway.simulator.models import JsonObject, Memory
from gateway.simulator.response import Response


@dataclass
class Switches:
    """The faults of ``POST /_simulator/faults``; every field is one switch."""

    refuse_websockets: bool = False  #: every WebSocket upgrade gets 503
    silent_after_upgrade: bool = False  #: the authentication frame is never answered
    silent_rpc: bool = False  #: no RPC is answered
    silent_http: bool = False  #: ``/v1`` and the greeting hang until this is off
    fail_loads: str | None = None  #: every load fails with this cause
    refuse_rpc: str | None = None  #: calls of this endpoint are refused
    silent_endpoint: str | None = None  #: calls of this endpoint are made, but not answered
    odd_frames: bool = False  #: frames that no client knows come before each reply
    odd_progress: bool = False  #: the progress of a load is no number from 0 to 1
    close_loads: bool = False  #: the channel of a load closes before its success
    load_ms: int = 0  #: how long a load takes; 0: as long as the model's size suggests
    unknown_model_type: bool = False  #: two models that the SDK's types don't know are listed


class Socket(Protocol):
    """An open WebSocket, as the control paths see it."""

    namespace: str

    def drop(self) -> None:
        """Reset the TCP connection."""


class Simulator:
    """Everything that one running simulator knows; ``pace_ms`` is the time between two tokens."""

    def __init__(self, token: str | None, pace_ms: float) -> None:
        self.token, self.pace_ms = token or None, pace_ms
        self.sockets: set[Socket] = set()
        self._reset()

    def control(self, method: str, target: str, body: bytes) -> Response:
        """Answer one request below ``/_simulator/``."""
        path, _, query = target.partition("?")
        match method, path.removeprefix("/_simulator/"):
            case "POST", "faults":
                return self._set_faults(json.loads(body))
            case "POST", "reset":
                for load in self.memory.loads:
                    load.cancel()
                self._reset()
                return Response({})
            case "GET", "state":
                state = {
                    "loaded": [vars(one) for one in self.memory.instances.values()],
                    "loads": [vars(one) for one in self.memory.loads],
                    "sockets": Counter(socket.namespace for socket in self.sockets),
                    "socketsOpened": self.opened,
                    "warnings": list(self.warnings),
                    "clients": list(self.clients),
                }
                return Response(state)
            case "GET", "requests":
                since = int(parse_qs(query).get("since", ["0"])[0])
                return Response({"requests": [one for one in self.records if one["id"] > since]})
        return Response({"error": f"Unknown control path: {method} {path}"}, 404)

    def _set_faults(self, switches: JsonObject) -> Response:
        """Set these switches. ``drop_sockets`` isn't one: it drops the open WebSockets once."""
        kinds = get_type_hints(Switches)
        if switches.pop("drop_sockets", False):
            for socket in list(self.sockets):
                socket.drop()
        for name, value in switches.items():
            if name not in kinds or not isinstance(value, kinds[name]):
                return Response({"error": f"Unknown fault, or a bad value for it: {name}"}, 400)
        vars(self.switches).update(switches)
        return Response(vars(self.switches))

    def _reset(self) -> None:
        """Switch faults off, unload everything and clear the records; sockets stay open."""
        self.switches, self.memory = Switches(), Memory()
        #: The requests of LM Studio's API; server.py has their fields.
        self.records: deque[JsonObject] = deque(maxlen=2000)
        self.warnings: deque[str] = deque(maxlen=1000)
        self.clients: deque[str] = deque(maxlen=1000)
        self.opened = Counter(socket.namespace for socket in self.sockets)
