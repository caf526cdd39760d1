"""The shared state of one machine: a SQLite file in WAL mode and a small shared file."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import gevent
from gevent.threadpool import ThreadPool

from gateway.state.process import birth
from gateway.state.shared_file import PRIVATE, SharedFile, make_private
from gateway.state.store import MAX_AGE_SECONDS, MAX_EVENTS, Active, Batch, StoredEvent, StoreError

#: The clock by which events age, in seconds since boot: setting the time of day does not move it.
#: An event from before the last boot appears to be from the future, or younger than it is.
_LOG_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

#: Seconds to wait for the lock of another process.
_LOCK_TIMEOUT = 5.0

_T = TypeVar("_T")


class SqliteStore:
    """A :class:`.store.SharedStore` for any number of workers on one machine.

    The shared file holds a random token that changes with the active model, and the id of the
    newest event, so checking for changes costs neither a query nor a system call.
    """

    #: Seconds between two checks for new events.
    POLL_SECONDS = 0.03
    multi_machine = False
    _TOKEN = slice(0, 16)
    _NEWEST = struct.Struct("<q")
    _NEWEST_AT = 16
    _SHARED_BYTES = 24

    def __init__(self, path: Path) -> None:
        self._pid = os.getpid()
        self._birth = birth(self._pid)
        self._lock = threading.Lock()
        self._database = open_sqlite(path)
        self._database.executescript(_SCHEMA)
        # The log has a connection and a real thread of its own, so that neither a slow disk nor
        # another worker's lock delays inference or other greenlets.
        self._log = open_sqlite(path)
        self._thread = ThreadPool(1)
        self._shared = SharedFile(path.with_name(path.name + "-shared"), self._SHARED_BYTES)
        self._token: bytes | None = None
        self._active: Active | None = None

    def active(self) -> Active | None:
        token = self._shared.view[self._TOKEN]
        if token != self._token:
            try:
                self._active = self._read_active()
                self._token = token
            except sqlite3.Error:
                # keep the last known one until it can be read: a bad disk must not stop inference
                return self._active
        return self._active

    def set_active(self, active: Active | None) -> None:
        self._in_thread(self._set_active, active.to_json() if active else "null")

    def append(self, batch: Batch) -> None:
        self._in_thread(self._append, batch)

    def after(self, last_id: int, limit: int) -> list[StoredEvent]:
        query = "SELECT id, type, data FROM events WHERE id > ? ORDER BY id LIMIT ?"
        return [StoredEvent(*row) for row in self._select(query, last_id, limit)]

    def span(self) -> tuple[int, int]:
        [(oldest, newest)] = self._select("SELECT min(id), max(id) FROM events")
        if newest is None:
            rows = self._select("SELECT seq FROM sqlite_sequence WHERE name = 'events'")
            newest = rows[0][0] if rows else 0
            oldest = newest + 1
        return oldest, newest

    def latest(self, event_type: str, count: int) -> list[dict[str, Any]]:
        query = "SELECT data FROM events WHERE type = ? ORDER BY id DESC LIMIT ?"
        return [json.loads(data) for (data,) in self._select(query, event_type, count)]

    def wait(self, last_id: int, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self._newest() == last_id and time.monotonic() < deadline:
            gevent.sleep(self.POLL_SECONDS)

    def in_flight(self) -> list[dict[str, Any]]:
        rows = self._select("SELECT pid, birth, data FROM in_flight ORDER BY rowid")
        return [json.loads(data) for pid, born, data in rows if birth(pid) == born]

    def take_lost(self) -> list[dict[str, Any]]:
        lost: list[dict[str, Any]] = []
        for pid, born in self._select("SELECT DISTINCT pid, birth FROM in_flight"):
            if birth(pid) != born:
                # only one of the workers that notice the death gets the rows
                query = "DELETE FROM in_flight WHERE pid = ? AND birth = ? RETURNING data"
                lost += [json.loads(data) for (data,) in self._select(query, pid, born)]
        return lost

    def host_state(self, host: str) -> str:
        rows = self._select("SELECT value FROM state WHERE name = ?", f"host:{host}")
        return str(rows[0][0]) if rows else "up"

    def set_host_state(self, host: str, state: str) -> bool:
        name = f"host:{host}"
        self._select("INSERT OR IGNORE INTO state VALUES (?, 'up')", name)
        change = "UPDATE state SET value = ? WHERE name = ? AND value <> ? RETURNING 1"
        return bool(self._select(change, state, name, state))

    def share_counters(self, counters: dict[str, float]) -> None:
        """Do nothing: there is no other machine."""

    def other_counters(self) -> list[dict[str, float]]:
        return []

    def ping(self) -> None:
        self._select("SELECT 1")

    def close(self) -> None:
        self._thread.kill()
        self._database.close()
        self._log.close()
        self._shared.close()

    def _read_active(self) -> Active | None:
        with self._lock:
            row = self._database.execute("SELECT value FROM state WHERE name = 'active'").fetchone()
        return Active.from_json(row[0]) if row else None

    def _set_active(self, value: str) -> None:
        """Runs in the log's thread."""
        self._log.execute(
            "INSERT INTO state VALUES ('active', ?)"
            " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (value,),
        )
        self._shared.write(0, os.urandom(16))

    def _append(self, batch: Batch) -> None:
        """Runs in the log's thread, as one transaction."""
        log = self._log
        now = time.clock_gettime(_LOG_CLOCK)
        with log:
            log.execute("BEGIN IMMEDIATE")
            log.executemany(
                "INSERT INTO events (type, data, at) VALUES (?, ?, ?)",
                [(kind, data, now) for kind, data in batch.events],
            )
            log.executemany(
                "INSERT INTO in_flight (id, pid, birth, data) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET data = excluded.data",
                [(key, self._pid, self._birth, data) for key, data in batch.begun.items()],
            )
            log.executemany("DELETE FROM in_flight WHERE id = ?", [(key,) for key in batch.ended])
            [(newest,)] = log.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'")
            # only every 512 events: the bound need not be exact
            if newest // 512 != (newest - len(batch.events)) // 512:
                log.execute(
                    "DELETE FROM events WHERE id <= ? OR at < ?",
                    (newest - MAX_EVENTS, now - MAX_AGE_SECONDS),
                )
        with suppress(OSError):  # the events are written; readers find them even without the hint
            self._shared.write(self._NEWEST_AT, self._NEWEST.pack(newest))

    def _newest(self) -> int:
        newest: int = self._NEWEST.unpack_from(self._shared.view, self._NEWEST_AT)[0]
        return newest

    def _select(self, query: str, *values: Any) -> list[Any]:
        return self._in_thread(lambda: self._log.execute(query, values).fetchall())

    def _in_thread(self, work: Callable[..., _T], *arguments: Any) -> _T:
        def guarded() -> tuple[Any, Exception | None]:
            # gevent prints the traceback of any exception that escapes from its threads
            try:
                return work(*arguments), None
            except (sqlite3.Error, OSError) as error:
                return None, error

        result, error = self._thread.apply(guarded)
        if error is not None:
            raise StoreError(f"The shared state is unavailable: {error}.")
        return cast(_T, result)


_SCHEMA = """
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, type TEXT NOT NULL, data BLOB NOT NULL, at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS in_flight (
    id TEXT PRIMARY KEY, pid INTEGER NOT NULL, birth INTEGER NOT NULL, data BLOB NOT NULL
);
"""


def open_sqlite(path: Path) -> sqlite3.Connection:
    """Open the database of a SQLite store, creating it if needed.

    Only the gateway's own user may read the file: events name clients and models. Raises OSError
    or sqlite3.Error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # SQLite gives the files beside it the mode of the database. One that exists is not opened here:
    # closing it would drop the locks of this process's other connections.
    if not path.exists():
        with suppress(FileExistsError):  # another process was faster
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, PRIVATE))
    for suffix in ("", "-wal", "-shm", "-journal"):
        make_private(path.with_name(path.name + suffix))
    database = sqlite3.connect(
        path, timeout=_LOCK_TIMEOUT, isolation_level=None, check_same_thread=False
    )
    _use_wal(database)
    database.execute("PRAGMA synchronous=NORMAL")
    return database


def _use_wal(database: sqlite3.Connection) -> None:
    """Switch to WAL mode, waiting for other processes that open the same new database.

    SQLite does not apply the connection's timeout where waiting could deadlock, but fails at once
    (https://www.sqlite.org/c3ref/busy_handler.html).
    """
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while True:
        try:
            database.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
