"""Opens the store that ``STATE_URL`` names."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from gateway.state.sqlite import SqliteStore
from gateway.state.store import SharedStore, StoreError


def open_store(url: str, instance_path: str) -> SharedStore:
    """Open the store that ``STATE_URL`` names.

    An empty URL means ``state.db`` in Flask's instance folder. Raises :class:`StoreError` when the
    store can't be opened.
    """
    path = sqlite_path(url, instance_path)
    if path is None:
        # only Redis needs its client, an optional dependency
        from gateway.state.redis import RedisStore

        return RedisStore(url)
    try:
        return SqliteStore(path)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"cannot open {path}: {error}") from None


def check_redis(url: str) -> None:
    """Raise ValueError if a Redis store can't be opened with this URL. Does not connect."""
    # an optional dependency
    from gateway.state.redis import open_redis

    open_redis(url).close()


def sqlite_path(url: str, instance_path: str) -> Path | None:
    """The file that a ``STATE_URL`` names, or None if it does not name a SQLite store.

    An empty URL means ``state.db`` in the instance folder.
    """
    if not url:
        return Path(instance_path, "state.db")
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:") else None
