"""The state that all workers share: the active model.

``STATE_URL`` chooses the implementation. :meth:`SqliteStore.active` is on the path of every
inference request and touches no database: a few bytes in a memory-mapped file tell whether the
cached value still holds.
"""

from __future__ import annotations

import json
import mmap
import os
import sqlite3
import threading
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from gateway.errors import GatewayError


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


class StoreError(GatewayError):
    """The shared state can't be read or written."""

    status, code = 503, "state_unavailable"
    headers = [("Retry-After", "5")]


class SharedStore(Protocol):
    """What every implementation offers."""

    def active(self) -> Active | None:
        """The active model as of the last answered change by any worker."""

    def set_active(self, active: Active | None) -> None:
        """Change the active model for every worker before this returns."""

    def close(self) -> None:
        """Release files and connections."""


class SqliteStore:
    """One machine, any number of workers: a SQLite file in WAL mode and a small mapped file.

    The mapped file holds a random token that changes after each committed change; a worker whose
    cached token differs reads the database again.
    """

    TOKEN_BYTES = 16

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(
            path, timeout=5, isolation_level=None, check_same_thread=False
        )
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value TEXT NOT NULL)"
        )
        self._token = _map_token(path.with_name(path.name + "-token"), self.TOKEN_BYTES)
        self._seen: bytes | None = None
        self._active: Active | None = None

    def active(self) -> Active | None:
        token = self._token[: self.TOKEN_BYTES]
        if token != self._seen:
            self._active = self._read_active()
            self._seen = token
        return self._active

    def set_active(self, active: Active | None) -> None:
        value = json.dumps(asdict(active)) if active else "null"
        try:
            with self._lock:
                self._database.execute(
                    "INSERT INTO state VALUES ('active', ?)"
                    " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                    (value,),
                )
                self._token[: self.TOKEN_BYTES] = os.urandom(self.TOKEN_BYTES)
        except sqlite3.Error as error:
            raise StoreError(f"The active model can't be saved: {error}.") from None

    def close(self) -> None:
        self._database.close()
        self._token.close()

    def _read_active(self) -> Active | None:
        try:
            with self._lock:
                row = self._database.execute(
                    "SELECT value FROM state WHERE name = 'active'"
                ).fetchone()
        except sqlite3.Error:
            return self._active  # the last known one: a sick disk must not stop inference
        value = json.loads(row[0]) if row else None
        return Active(**value) if value else None


def open_store(url: str, instance_path: str) -> SharedStore:
    """The store that ``STATE_URL`` names; empty: ``state.db`` in Flask's instance folder.

    Raises :class:`StoreError` when it can't be opened.
    """
    path = Path(url.removeprefix("sqlite:///") if url else os.path.join(instance_path, "state.db"))
    try:
        return SqliteStore(path)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"cannot open {path}: {error}") from None


def _map_token(path: Path, size: int) -> mmap.mmap:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if os.fstat(handle).st_size < size:
            os.ftruncate(handle, size)
        return mmap.mmap(handle, size)
    finally:
        os.close(handle)
