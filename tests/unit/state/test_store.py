"""The SQLite store: every worker sees a change at once, and the state survives a restart."""

from __future__ import annotations

import os
import socketserver
import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import gevent
import pytest

from gateway.state import Active, Batch, StoreError, check_redis, open_store
from gateway.state.sqlite import SqliteStore

DEFAULTS = {"temperature": 0.5, "stopStrings": ["a", "ü"], "stream": True, "topK": 10**9}
ACTIVE = Active("key", "instance", "llm", DEFAULTS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "nested" / "state.db"


@pytest.fixture
def pair(path: Path) -> Iterator[tuple[SqliteStore, SqliteStore]]:
    first, second = SqliteStore(path), SqliteStore(path)
    yield first, second
    first.close()
    second.close()


def test_a_new_store_has_no_active_model(pair: tuple[SqliteStore, SqliteStore]) -> None:
    assert pair[0].active() is pair[1].active() is None


def test_the_other_worker_sees_a_change_at_once(pair: tuple[SqliteStore, SqliteStore]) -> None:
    first, second = pair
    for number in range(200):
        active = Active(f"key-{number}", None, "llm", {"maxTokens": number})
        writer, reader = (first, second) if number % 2 else (second, first)
        writer.set_active(active)
        assert reader.active() == active
        assert writer.active() == active
    first.set_active(None)
    assert second.active() is None


def test_concurrent_writers_agree_on_the_last_value(
    pair: tuple[SqliteStore, SqliteStore],
) -> None:
    def write(store: SqliteStore, name: str) -> None:
        for number in range(50):
            store.set_active(Active(f"{name}-{number}", None, "llm"))

    threads = [
        threading.Thread(target=write, args=(store, name))
        for store, name in zip(pair, "ab", strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    last = pair[0].active()
    assert last == pair[1].active()
    assert last is not None
    assert last.model_key in ("a-49", "b-49")


def test_the_active_model_survives_closing_the_store(path: Path) -> None:
    store = SqliteStore(path)
    store.set_active(ACTIVE)
    store.close()
    reopened = SqliteStore(path)
    assert reopened.active() == ACTIVE
    reopened.close()


def test_repeated_reads_return_the_same_object(
    pair: tuple[SqliteStore, SqliteStore],
) -> None:
    pair[0].set_active(ACTIVE)
    assert pair[1].active() is pair[1].active()


def test_the_injected_model_is_the_instance_id_or_else_the_key() -> None:
    assert ACTIVE.model == "instance"
    assert Active("key", None, "llm").model == "key"
    assert ACTIVE.default_texts["stopStrings"] == '["a", "ü"]'
    assert ACTIVE.default_texts["stream"] == "true"


def rename_table(path: Path, old: str, new: str) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute(f"ALTER TABLE {old} RENAME TO {new}")


def test_a_failed_write_is_an_error_and_changes_nothing(
    pair: tuple[SqliteStore, SqliteStore], path: Path
) -> None:
    pair[0].set_active(ACTIVE)
    assert pair[0].active() == ACTIVE
    rename_table(path, "state", "renamed")
    with pytest.raises(StoreError) as caught:
        pair[0].set_active(None)
    assert (caught.value.status, caught.value.code) == (503, "state_unavailable")
    assert pair[0].active() == ACTIVE


def test_a_write_that_waits_for_a_lock_blocks_no_other_greenlet(
    pair: tuple[SqliteStore, SqliteStore], path: Path
) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        releasing = gevent.spawn_later(0.2, other.rollback)
        pair[0].set_active(ACTIVE)
        assert releasing.ready()
    assert pair[1].active() == ACTIVE


def test_a_failed_read_returns_the_last_known_value_until_reads_succeed_again(
    pair: tuple[SqliteStore, SqliteStore], path: Path
) -> None:
    pair[0].set_active(ACTIVE)
    assert pair[1].active() == ACTIVE
    newer = Active("newer", None, "llm")
    pair[0].set_active(newer)
    rename_table(path, "state", "renamed")
    assert pair[1].active() == ACTIVE
    rename_table(path, "renamed", "state")
    assert pair[1].active() == newer


def test_the_url_names_the_file_and_an_empty_one_means_the_instance_folder(tmp_path: Path) -> None:
    open_store(f"sqlite:///{tmp_path}/a.db", "/nowhere").close()
    open_store("", str(tmp_path / "instance")).close()
    assert (tmp_path / "a.db").exists()
    assert (tmp_path / "instance" / "state.db").exists()


@pytest.fixture
def umask() -> Iterator[None]:
    """A umask that takes nothing away."""
    before = os.umask(0)
    yield
    os.umask(before)


def modes(path: Path) -> dict[str, int]:
    """The mode of every file of a store, by its suffix."""
    files = path.parent.glob(path.name + "*")
    return {file.name.removeprefix(path.name): stat.S_IMODE(file.stat().st_mode) for file in files}


@pytest.mark.usefixtures("umask")
def test_only_the_owner_can_read_the_files_of_a_new_store(path: Path) -> None:
    with closing(SqliteStore(path)) as store:
        store.set_active(ACTIVE)
        found = modes(path)
        assert set(found) == {"", "-wal", "-shm", "-shared"}
        assert set(found.values()) == {0o600}


@pytest.mark.usefixtures("umask")
def test_the_files_of_an_existing_store_become_private(path: Path) -> None:
    with closing(SqliteStore(path)) as store:
        store.set_active(ACTIVE)
        for file in path.parent.glob(path.name + "*"):
            file.chmod(0o644)
        assert set(modes(path).values()) == {0o644}
        with closing(SqliteStore(path)) as other:
            assert set(modes(path).values()) == {0o600}
            assert other.active() == ACTIVE


@pytest.mark.parametrize(
    "url", ["redis://:hunter2@host/0?colour=1", "redis://:hunter2@host/0?socket_timeout=long"]
)
def test_a_redis_url_with_a_wrong_option_is_an_error_without_the_password(url: str) -> None:
    check_redis("redis://:hunter2@host/0?socket_timeout=5")
    with pytest.raises(ValueError, match="option") as caught:
        check_redis(url)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(StoreError, match="STATE_URL"):
        open_store(url, "")


def test_an_error_of_redis_never_contains_the_password() -> None:
    """Redis before version 6 does not know HELLO, and repeats the arguments of what it rejects."""
    answer = b"-ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `hunter2`,\r\n"

    class Reject(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while b"hunter2" in self.request.recv(65536):
                self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Reject) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"redis://:hunter2@127.0.0.1:{server.server_address[1]}/0"
        with closing(open_store(url, "")) as store:
            with pytest.raises(StoreError, match="unknown command") as caught:
                store.ping()
            assert "hunter2" not in caught.value.message
        server.shutdown()


def test_an_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", Path("/proc/1")):
        with pytest.raises(StoreError) as caught:
            open_store(f"sqlite:///{folder}/state.db", "")
        assert str(folder) in caught.value.message


def test_liveness_checks_send_no_signal_on_windows(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``os.kill(pid, 0)`` ends the process there."""
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr("os.kill", lambda *_: pytest.fail("killed"))
    first = SqliteStore(path)
    first.append(Batch([("inference_start", b"{}")], {"a": b'{"name": "own"}'}))
    assert first.in_flight() == [{"name": "own"}]
    monkeypatch.setattr("gateway.state.process._BORN", 1)
    second = SqliteStore(path)  # a later process with the same number
    assert second.in_flight() == []
    assert second.take_lost() == [{"name": "own"}]
    first.close()
    second.close()


def test_opening_waits_for_another_process_that_is_creating_the_database(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        finishing = threading.Timer(0.2, other.rollback)
        finishing.start()
        SqliteStore(path).close()
        finishing.join()


def test_a_file_that_is_not_a_database_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(StoreError, match="not a database"):
        open_store(f"sqlite:///{path}", "")
