"""What a store of shared state offers, and the values that it holds.

:meth:`SharedStore.active` is on the path of every inference request and reads memory only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from gateway.errors import GatewayError

#: The log keeps this many events, and none older than a day.
MAX_EVENTS = 10_000
MAX_AGE_SECONDS = 86_400


@dataclass(frozen=True)
class Active:
    """The active model: what is injected where a request names none."""

    model_key: str
    instance_id: str | None
    #: ``llm`` or ``embedding``.
    model_type: str
    #: ``defaultInference`` as validated: contract names, plain values.
    default_inference: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """What goes into ``model``: the instance if one is named, else the key."""
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
    """What a worker appends at once: events, and which operations began or ended with them."""

    events: list[tuple[str, bytes]] = field(default_factory=list)
    #: Operation id → JSON of what /debug/status shows while it runs.
    begun: dict[str, bytes] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)


class SharedStore(Protocol):
    """What every implementation offers. All but ``active`` may raise :class:`StoreError`."""

    #: Whether other machines may share this state, and so want to be told the counters.
    many_machines: bool

    def active(self) -> Active | None:
        """The active model as of the last answered change by any worker."""

    def set_active(self, active: Active | None) -> None:
        """Change the active model for every worker before this returns."""

    def append(self, batch: Batch) -> None:
        """Add events to the log, in order, and note what is in flight."""

    def after(self, last_id: int, limit: int) -> list[StoredEvent]:
        """The events behind ``last_id``, oldest first."""

    def span(self) -> tuple[int, int]:
        """Ids of the oldest and the newest event of the log; of an empty one (n + 1, n)."""

    def latest(self, event_type: str, count: int) -> list[dict[str, Any]]:
        """The data of the newest events of a type, newest first."""

    def wait(self, last_id: int, timeout: float) -> None:
        """Return when there may be events behind ``last_id``, or after ``timeout`` s."""

    def in_flight(self) -> list[dict[str, Any]]:
        """What runs now in any living worker, oldest first."""

    def take_lost(self) -> list[dict[str, Any]]:
        """Remove and return what was in flight in workers that have died."""

    def share_counters(self, counters: dict[str, float]) -> None:
        """Tell the other machines this machine's counters."""

    def other_counters(self) -> list[dict[str, float]]:
        """The counters of the other machines."""

    def ping(self) -> None:
        """Raise StoreError when the store does not answer."""

    def close(self) -> None:
        """Release files and connections."""


def merge(batches: Sequence[Batch]) -> Batch:
    """Several batches as one; what began and ended in between never was in flight."""
    whole = Batch()
    for batch in batches:
        whole.events += batch.events
        whole.begun.update(batch.begun)
        whole.ended |= batch.ended
    for key in whole.ended & whole.begun.keys():
        del whole.begun[key]
    return whole
