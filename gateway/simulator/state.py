"""Everything that one running simulator knows."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import asdict
from typing import TYPE_CHECKING

from gateway.simulator.catalogue import JsonObject
from gateway.simulator.faults import Faults
from gateway.simulator.journal import Journal
from gateway.simulator.memory import Memory

if TYPE_CHECKING:
    from gateway.simulator.websocket import Session


class Simulator:
    """The parts, and what tests may ask about them.

    ``token`` is the API token that callers must show, or ``None``; ``pace_ms`` the time between
    two tokens of an answer.
    """

    def __init__(self, token: str | None = None, pace_ms: float = 20) -> None:
        self.token = token
        self.pace_ms = pace_ms
        self.faults = Faults()
        self.memory = Memory(self.faults)
        self.journal = Journal()
        self.sessions: set[Session] = set()
        self.opened: Counter[str] = Counter()
        self.warnings: deque[str] = deque(maxlen=1000)
        self.clients: deque[str] = deque(maxlen=1000)

    def report(self) -> JsonObject:
        """Return the answer to ``GET /_simulator/state``."""
        return {
            "loaded": [
                {
                    "identifier": one.identifier,
                    "modelKey": one.model.key,
                    "type": one.model.type,
                    "ttlMs": one.ttl_ms,
                    "contextLength": one.context_length,
                    "config": one.config,
                    "ignored": one.ignored,
                }
                for one in self.memory.instances.values()
            ],
            "loads": [asdict(attempt) for attempt in self.memory.attempts],
            "sockets": dict(Counter(session.namespace for session in self.sessions)),
            "socketsOpened": dict(self.opened),
            "warnings": list(self.warnings),
            "clients": list(self.clients),
        }

    def drop_sockets(self) -> None:
        """Cut every open WebSocket without a closing handshake."""
        for session in list(self.sessions):
            session.drop()

    def reset(self) -> None:
        """Switch faults off, unload everything and clear the records; sockets stay open."""
        self.faults.reset()
        self.memory.reset()
        self.journal.clear()
        self.warnings.clear()
        self.clients.clear()
        self.opened = Counter(session.namespace for session in self.sessions)
