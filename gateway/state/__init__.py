"""The state that all workers share: the active model, the event log, the operations in flight.

:mod:`.store` declares what a store offers and is the file to read first; :mod:`.sqlite` implements
it for the workers of one machine, :mod:`.redis` for several machines. :func:`open_store` chooses by
``STATE_URL``.

This package must not know about Flask, about HTTP or about LM Studio.
"""

from gateway.state.opening import check_redis, open_store, sqlite_path
from gateway.state.sqlite import open_sqlite
from gateway.state.store import (
    MAX_EVENTS,
    Active,
    Batch,
    SharedStore,
    StoredEvent,
    StoreError,
    merge,
)

__all__ = [
    "MAX_EVENTS",
    "Active",
    "Batch",
    "SharedStore",
    "StoreError",
    "StoredEvent",
    "check_redis",
    "merge",
    "open_sqlite",
    "open_store",
    "sqlite_path",
]
