"""What all workers share: the active model, the event log, the requests in flight.

``STATE_URL`` chooses the implementation: SQLite here for one machine, Redis in
:mod:`gateway.redis_store` for several. :meth:`SharedStore.active` is on the path of every inference
request and reads memory only.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import sqlite3
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import gevent
from gevent.threadpool import ThreadPool

from gateway.errors import GatewayError

#: The log keeps this many events, and none older than a day.
MAX_EVENTS = 10_000
MAX_AGE_SECONDS = 86_400
#: What ages are measured by: seconds since the machine started, which no change of its clock moves.
#: An event from before the last start has a greater number or is at least as old as it seems.
_LOG_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

_T = TypeVar("_T")


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


class SqliteStore:
    """One machine, any number of workers: a SQLite file in WAL mode and a small shared file.

    The shared file holds a random token that changes after each change of the active model, and the
    id of the newest event: a glance at it tells whether there is something to read.
    """

    #: Seconds between two glances of a tailer.
    POLL_SECONDS = 0.03
    many_machines = False
    _TOKEN = slice(0, 16)
    _NEWEST = struct.Struct("<q")
    _NEWEST_AT = 16
    _SHARED_BYTES = 24

    def __init__(self, path: Path) -> None:
        self._pid = os.getpid()
        self._birth = _birth(self._pid)
        self._lock = threading.Lock()
        self._database = open_sqlite(path)
        self._database.executescript(_SCHEMA)
        # Writing has a connection and a real thread of its own: a slow disk or another's lock
        # delays neither inference nor other greenlets.
        self._log = open_sqlite(path)
        self._thread = ThreadPool(1)
        self._shared = _SharedFile(path.with_name(path.name + "-shared"), self._SHARED_BYTES)
        self._seen: bytes | None = None
        self._active: Active | None = None

    def active(self) -> Active | None:
        token = self._shared.view[self._TOKEN]
        if token != self._seen:
            try:
                self._active = self._read_active()
                self._seen = token
            except sqlite3.Error:
                # the last known one, until it can be read: a sick disk must not stop inference
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
        return [json.loads(data) for pid, birth, data in rows if _birth(pid) == birth]

    def take_lost(self) -> list[dict[str, Any]]:
        lost: list[dict[str, Any]] = []
        for pid, birth in self._select("SELECT DISTINCT pid, birth FROM in_flight"):
            if _birth(pid) != birth:
                # only one of the workers that notice the death gets the rows
                query = "DELETE FROM in_flight WHERE pid = ? AND birth = ? RETURNING data"
                lost += [json.loads(data) for (data,) in self._select(query, pid, birth)]
        return lost

    def share_counters(self, counters: dict[str, float]) -> None:
        """There is no other machine."""

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
        """In the log's thread."""
        self._log.execute(
            "INSERT INTO state VALUES ('active', ?)"
            " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (value,),
        )
        self._shared.write(0, os.urandom(16))

    def _append(self, batch: Batch) -> None:
        """In the log's thread: one transaction."""
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
            # every so often only: the bound is not exact
            if newest // 512 != (newest - len(batch.events)) // 512:
                log.execute(
                    "DELETE FROM events WHERE id <= ? OR at < ?",
                    (newest - MAX_EVENTS, now - MAX_AGE_SECONDS),
                )
        with suppress(OSError):  # the events are written: readers find them without the hint too
            self._shared.write(self._NEWEST_AT, self._NEWEST.pack(newest))

    def _newest(self) -> int:
        newest: int = self._NEWEST.unpack_from(self._shared.view, self._NEWEST_AT)[0]
        return newest

    def _select(self, query: str, *values: Any) -> list[Any]:
        return self._in_thread(lambda: self._log.execute(query, values).fetchall())

    def _in_thread(self, work: Callable[..., _T], *arguments: Any) -> _T:
        def guarded() -> tuple[Any, Exception | None]:
            # an error that leaves the thread would also be printed with its traceback
            try:
                return work(*arguments), None
            except (sqlite3.Error, OSError) as error:
                return None, error

        result, error = self._thread.apply(guarded)
        if error is not None:
            raise StoreError(f"The shared state can't be used: {error}.")
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


def open_store(url: str, instance_path: str) -> SharedStore:
    """The store that ``STATE_URL`` names; empty: ``state.db`` in Flask's instance folder.

    Raises :class:`StoreError` when it can't be opened.
    """
    path = sqlite_path(url, instance_path)
    if path is None:
        from gateway.redis_store import RedisStore

        return RedisStore(url)
    try:
        return SqliteStore(path)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"cannot open {path}: {error}") from None


def sqlite_path(url: str, instance_path: str) -> Path | None:
    """The file of a SQLite ``STATE_URL`` (empty: in the instance folder); None for another kind."""
    if not url:
        return Path(instance_path, "state.db")
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:") else None


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


def open_sqlite(path: Path) -> sqlite3.Connection:
    """Open (and make) the state's database. Raises OSError or sqlite3.Error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=NORMAL")
    return database


class _SharedFile:
    """A few bytes that all workers see. ``view`` is mapped memory; writing is a call, as a mapped
    page that the disk does not take would be the process's death and not an OSError."""

    def __init__(self, path: Path, size: int) -> None:
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            if error.errno != errno.EROFS or not path.exists():
                raise
            # the disk became read-only while the gateway runs: a new worker reads at least
            self._handle = os.open(path, os.O_RDONLY)
        try:
            if os.fstat(self._handle).st_size < size:
                os.pwrite(self._handle, b"\0", size - 1)
            self.view = mmap.mmap(self._handle, size, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(self._handle)
            raise

    def write(self, at: int, data: bytes) -> None:
        """Raises OSError."""
        os.pwrite(self._handle, data, at)

    def close(self) -> None:
        self.view.close()
        os.close(self._handle)


#: What tells this process from another one with its number, on Windows.
_BORN = time.time_ns()


def _birth(pid: int) -> int:
    """When a process started, in clock ticks, which tells it from a later one with its number;
    -1 for a dead one, 0 where the system does not tell (no /proc)."""
    if sys.platform == "win32":
        # os.kill(pid, 0) would end it; a single process serves there
        return _BORN if pid == os.getpid() else -1
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except PermissionError:
        pass
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # the name, in brackets, may hold anything; the start time is the 20th field behind it
    return int(status[status.rindex(")") + 2 :].split()[19])
