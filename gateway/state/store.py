"""The interface of a store of shared state, and the values that it holds.

:meth:`SharedStore.active` is called for every inference request, so it only reads memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from gateway.errors import GatewayError

#: The log keeps about this many events, and none older than a day.
MAX_EVENTS = 10_000
MAX_AGE_SECONDS = 86_400


@dataclass(frozen=True)
class Active:
    """The active model, which is injected into requests that name none."""

    model_key: str
    instance_id: str | None
    #: ``llm`` or ``embedding``.
    model_type: str
    #: ``defaultInference`` as validated, under its names in the API.
    default_inference: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The value for ``model`` in requests: the instance id if there is one, else the key."""
        return self.instance_id or self.model_key

    @cached_property
    def default_texts(self) -> dict[str, str]:
        """``default_inference`` with each value as JSON text."""
        return {
            name: json.dumps(value, ensure_ascii=False)
            for name, value in self.default_inference.items()
        }

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Active | None:
        value = json.loads(text)
        return cls(**value) if value else None


class StoreError(GatewayError):
    """The shared state can't be read or written."""

    status, code = 503, "state_unavailable"
    headers = [("Retry-After", "5")]


class StoredEvent(NamedTuple):
    """An event of the log; ``data`` is its JSON object in one line."""

    id: int
    type: str
    data: bytes


@dataclass
class Batch:
    """What a worker appends at once: events, and the operations that begin or end with them."""

    #: Type and data of each event; the data is a JSON object in one line.
    events: list[tuple[str, bytes]] = field(default_factory=list)
    #: Operation id → the JSON object that /debug/status shows while the operation is in flight.
    begun: dict[str, bytes] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)


class SharedStore(Protocol):
    """The interface of a store. All methods but ``active`` may raise :class:`StoreError`."""

    #: Whether other machines may share this state and need this machine's counters.
    multi_machine: bool

    def active(self) -> Active | None:
        """The active model, as set by the last :meth:`set_active` that returned in any worker."""

    def set_active(self, active: Active | None) -> None:
        """Change the active model; every worker uses the new one when this returns."""

    def append(self, batch: Batch) -> None:
        """Append events to the log, in order, and update what is in flight."""

    def after(self, last_id: int, limit: int) -> list[StoredEvent]:
        """Up to ``limit`` events with ids above ``last_id``, oldest first."""

    def span(self) -> tuple[int, int]:
        """The ids of the oldest and the newest event in the log; (n + 1, n) if it is empty."""

    def latest(self, event_type: str, count: int) -> list[dict[str, Any]]:
        """The data of the newest events of a type, newest first."""

    def wait(self, last_id: int, timeout: float) -> None:
        """Return when there may be events after ``last_id``, or after ``timeout`` seconds."""

    def in_flight(self) -> list[dict[str, Any]]:
        """The operations in flight in all living workers, oldest first."""

    def take_lost(self) -> list[dict[str, Any]]:
        """Remove and return the operations that were in flight in workers that have died.

        Each is returned to one caller only, in whatever worker.
        """

    def host_state(self, host: str) -> str:
        """``up`` or ``down``, as last set; ``up`` if it never was."""

    def set_host_state(self, host: str, state: str) -> bool:
        """Set whether a host is ``up`` or ``down``; returns whether it was the other before.

        Of several callers that set the same change, in whatever worker, one gets True.
        """

    def share_counters(self, counters: dict[str, float]) -> None:
        """Make this machine's counters available to the other machines."""

    def other_counters(self) -> list[dict[str, float]]:
        """The counters of the other machines, one dictionary each."""

    def ping(self) -> None:
        """Raise :class:`StoreError` if the store does not respond."""

    def close(self) -> None:
        """Release files and connections."""


def merge(batches: Sequence[Batch]) -> Batch:
    """Merge batches into one, without the operations that both begin and end in them."""
    whole = Batch()
    for batch in batches:
        whole.events += batch.events
        whole.begun.update(batch.begun)
        whole.ended |= batch.ended
    for key in whole.ended & whole.begun.keys():
        del whole.begun[key]
    return whole
