"""What every shared store promises, tested with each of them between several real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gateway.state import MAX_EVENTS, Active
from tests.processes import eventually
from tests.redis_server import RedisServer

#: Stands in for a worker: a patched process with a store, driven by lines of JSON on stdin.
_WORKER = """
from gevent import monkey
monkey.patch_all()
import json, sys
from gateway.state import Active, Batch, StoreError, open_store

def batch(events, begun=None, ended=()):
    encoded = [(kind, json.dumps(data).encode()) for kind, data in events]
    started = {key: json.dumps(value).encode() for key, value in (begun or {}).items()}
    return Batch(encoded, started, set(ended))

def append(*arguments):
    store.append(batch(*arguments))

def append_many(name, count, size):
    for number in range(count):
        store.append(batch([("inference_start", {"by": name, "n": number * size + at})
                            for at in range(size)]))

def after(last_id, limit):
    return [[e.id, e.type, json.loads(e.data)] for e in store.after(last_id, limit)]

def active():
    found = store.active()
    return found and json.loads(found.to_json())

def set_active(text):
    store.set_active(Active.from_json(text))


store = open_store(sys.argv[1], "")
from gevent.fileobject import FileObject
own = {"append": append, "append_many": append_many, "after": after, "active": active,
       "set_active": set_active}
print(json.dumps(["ready"]), flush=True)
for line in FileObject(sys.stdin.buffer, "rb"):
    name, arguments = json.loads(line)
    try:
        result = [(own.get(name) or getattr(store, name))(*arguments)]
    except StoreError as error:
        result = ["StoreError", error.message, error.status]
    print(json.dumps(result), flush=True)
store.close()
"""


class StoreFailed(Exception):
    """The store of a worker raised StoreError."""


class Worker:
    """A store in a process of its own."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-c", _WORKER, url]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
        self._ready = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            assert self.process.stdin is not None
            # wait only on the first call, so that several workers start at the same time
            self._ready = self._ready or self._result() == "ready"
            self.process.stdin.write(json.dumps([name, arguments]) + "\n")
            self.process.stdin.flush()
            return self._result()

        return call

    def _result(self) -> Any:
        assert self.process.stdout is not None
        value, *failure = json.loads(self.process.stdout.readline())
        if failure:
            raise StoreFailed(*failure)
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        self.process.communicate(timeout=20)


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[str]:
    """The URL of a new, empty state."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/state.db"
        return
    server = RedisServer(tmp_path / "redis")
    yield server.url
    server.stop()


@pytest.fixture
def open_worker(url: str) -> Iterator[Callable[[], Worker]]:
    opened: list[Worker] = []

    def start() -> Worker:
        opened.append(Worker(url))
        return opened[-1]

    yield start
    for worker in opened:
        worker.close()


@pytest.fixture
def pair(open_worker: Callable[[], Worker]) -> tuple[Worker, Worker]:
    return open_worker(), open_worker()


def events(count: int, kind: str = "inference_complete") -> list[Any]:
    return [[kind, {"n": number}] for number in range(count)]


def test_a_new_log_is_empty(pair: tuple[Worker, Worker]) -> None:
    for store in pair:
        assert store.span() == [1, 0]
        assert store.after(0, 10) == []
        assert store.latest("inference_complete", 10) == []
        assert store.in_flight() == store.take_lost() == []
        assert store.active() is None
        store.ping()


def test_every_worker_reads_all_events_in_order(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    first.append([*events(3), ["gap", {"missed": 1}]])
    second.append([["error", {"error": "ü€😀\n"}]])
    whole = [
        *[[n + 1, "inference_complete", {"n": n}] for n in range(3)],
        [4, "gap", {"missed": 1}],
        [5, "error", {"error": "ü€😀\n"}],
    ]
    for store in pair:
        assert store.after(0, 100) == whole
        assert store.after(2, 2) == whole[2:4]
        assert store.after(5, 10) == store.after(99, 10) == []
        assert store.span() == [1, 5]


def test_the_latest_events_of_a_type_are_listed_newest_first(pair: tuple[Worker, Worker]) -> None:
    pair[0].append(events(3))
    pair[1].append([["inference_start", {"n": 99}], ["inference_complete", {"n": 3}]])
    for store in pair:
        assert [one["n"] for one in store.latest("inference_complete", 3)] == [3, 2, 1]
        assert len(store.latest("inference_complete", 10)) == 4


def test_concurrent_processes_leave_no_holes_in_the_ids_and_keep_their_order(
    open_worker: Callable[[], Worker],
) -> None:
    workers = {name: open_worker() for name in "abcd"}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: one[1].append_many(one[0], 30, 7), workers.items()))
    found = workers["a"].after(0, 5000)
    assert [one[0] for one in found] == list(range(1, 4 * 30 * 7 + 1))
    for name in workers:
        assert [one[2]["n"] for one in found if one[2]["by"] == name] == list(range(210))


def test_the_log_is_bounded_and_its_span_shows_what_is_left(open_worker: Any) -> None:
    store = open_worker()
    total = MAX_EVENTS + 3000
    store.append_many("x", total // 1000, 1000)
    oldest, newest = store.span()
    assert newest == total
    assert MAX_EVENTS <= newest - oldest + 1 <= MAX_EVENTS + 1000
    assert store.after(0, 1)[0][0] == oldest > 1
    assert store.after(newest - 1, 10)[0][0] == newest


def test_an_event_of_another_process_ends_the_wait(pair: tuple[Worker, Worker]) -> None:
    pair[0].append(events(1))
    with ThreadPoolExecutor(1) as pool:

        def tail() -> Any:
            found: list[Any] = []
            while not found:
                pair[0].wait(1, 1.0)
                found = pair[0].after(1, 10)
            return found

        waiting = pool.submit(tail)
        pair[1].append(events(1))
        assert waiting.result(30) == [[2, "inference_complete", {"n": 0}]]
    pair[0].wait(2, 0.1)  # returns although there is no event


def running(number: int) -> dict[str, Any]:
    return {"requestId": f"r{number}", "operation": "inference", "startedAt": 1000.0 + number}


def test_every_worker_sees_what_is_in_flight_oldest_first(pair: tuple[Worker, Worker]) -> None:
    for number in range(12):
        pair[number % 2].append(events(1), {f"r{number}": running(number)})
    for store in pair:
        assert store.in_flight() == [running(number) for number in range(12)]
    pair[0].append(events(1), {}, ["r0", "unknown"])
    pair[1].append([], {}, [f"r{number}" for number in range(1, 11)])
    for store in pair:
        assert store.in_flight() == [running(11)]
        assert store.take_lost() == []


def test_the_operations_of_a_dead_process_are_taken_once(
    open_worker: Callable[[], Worker],
) -> None:
    first, second, victim = open_worker(), open_worker(), open_worker()
    first.append(events(1), {"r0": running(0)})
    victim.append(events(1), {"r1": running(1), "r2": running(2)})
    victim.kill()
    # with Redis a process counts as dead after some seconds without a heartbeat
    eventually(lambda: second.in_flight() == [running(0)], 20)
    with ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(lambda store: store.take_lost(), (first, second)))
    lost = sorted(one["requestId"] for part in taken for one in part)
    assert lost == ["r1", "r2"]
    assert first.take_lost() == second.take_lost() == []
    assert first.in_flight() == [running(0)]


def test_every_worker_sees_a_new_active_model_at_once(
    pair: tuple[Worker, Worker], open_worker: Callable[[], Worker]
) -> None:
    for number in range(30):
        writer, reader = (pair[0], pair[1]) if number % 2 else (pair[1], pair[0])
        active = Active(f"key-{number}", None, "llm", {"maxTokens": number, "stopStrings": ["ü"]})
        writer.set_active(active.to_json())
        for store in (reader, writer):
            assert store.active() == json.loads(active.to_json())
    assert open_worker().active() == json.loads(active.to_json())
    pair[0].set_active("null")
    assert pair[1].active() is None


def test_the_state_outlives_its_processes(url: str) -> None:
    first = Worker(url)
    first.append(events(2))
    first.set_active(Active("key", "instance", "llm").to_json())
    first.close()
    second = Worker(url)
    assert second.active()["instance_id"] == "instance"
    second.append(events(1))
    assert [one[0] for one in second.after(0, 9)] == [1, 2, 3]
    second.close()


def test_an_unavailable_redis_is_an_error_and_the_active_model_stays(tmp_path: Any) -> None:
    server = RedisServer(tmp_path / "redis")
    store = Worker(server.url)
    store.set_active(Active("key", None, "llm").to_json())
    server.stop()
    calls: list[tuple[Any, ...]] = [
        ("append", events(1)),
        ("after", 0, 1),
        ("span",),
        ("latest", "error", 1),
        ("wait", 0, 0.1),
        ("in_flight",),
        ("take_lost",),
        ("set_active", "null"),
        ("other_counters",),
        ("share_counters", {"requests": 1}),
        ("ping",),
    ]
    for name, *arguments in calls:
        with pytest.raises(StoreFailed) as caught:
            getattr(store, name)(*arguments)
        assert caught.value.args[1] == 503
        assert "Redis" in caught.value.args[0]
    assert store.active()["model_key"] == "key"
    server.start()
    eventually(lambda: is_available(store))
    store.append(events(1))
    store.close()
    server.stop()


def is_available(store: Worker) -> bool:
    try:
        store.ping()
    except StoreFailed:
        return False
    return True


def test_redis_may_start_after_the_worker(tmp_path: Any) -> None:
    server = RedisServer(tmp_path / "redis")
    server.stop()
    store = Worker(server.url)
    assert store.active() is None
    server.start()
    store.append(events(1))
    store.set_active(Active("key", None, "llm").to_json())
    assert store.active()["model_key"] == "key"
    store.close()
    server.stop()


def test_one_caller_only_changes_the_state_of_a_host(pair: tuple[Worker, Worker]) -> None:
    first, second = pair
    assert first.host_state("default") == "up"
    assert first.set_host_state("default", "up") is False
    with ThreadPoolExecutor(2) as pool:
        for state in ("down", "up") * 20:
            changes = [pool.submit(one.set_host_state, "default", state) for one in pair]
            assert sorted(change.result() for change in changes) == [False, True]
            assert second.host_state("default") == state
    assert first.set_host_state("other", "down") is True
    assert second.host_state("default") == "up"
