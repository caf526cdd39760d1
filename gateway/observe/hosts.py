"""Reports that LM Studio goes away or comes back: once, however many workers notice it."""

from __future__ import annotations

import logging

from gateway.observe.events import EventBus
from gateway.state import SharedStore, StoreError

#: The name of the only LM Studio.
DEFAULT_HOST = "default"

logger = logging.getLogger(__name__)


class HostReporter:
    """Publishes ``host_state`` events and writes the log line of each."""

    def __init__(self, store: SharedStore, events: EventBus) -> None:
        self._store = store
        self._events = events
        #: What this worker found last, for while the store is away.
        self._found = "up"

    def is_down(self) -> bool:
        """Whether a worker has found LM Studio down, and none has found it up since."""
        try:
            return self._store.host_state(DEFAULT_HOST) == "down"
        except StoreError:
            return False

    def report(self, state: str, reason: str) -> None:
        """Report the state that a worker found, unless another one has."""
        try:
            changed = self._store.set_host_state(DEFAULT_HOST, state)
        except StoreError:
            changed = state != self._found
        self._found = state
        if not changed:
            return
        if state == "down":
            logger.warning("LM Studio is down: %s", reason)
        else:
            logger.warning("LM Studio is up again")
        event = {"host": DEFAULT_HOST, "state": state}
        self._events.publish("host_state", event | ({"reason": reason} if reason else {}))
