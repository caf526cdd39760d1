"""The shared state in Redis, for the workers of several machines.

Events are a Redis stream whose ids are whole numbers handed out by one Lua script, so that they
increase strictly and have no gaps. A change of the active model is announced by PUBLISH, and the
announcing worker waits until every subscriber has acknowledged it: from its response on, all
workers agree.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import gevent
import redis
from gevent.event import Event

from gateway.state.store import MAX_EVENTS, Active, Batch, StoredEvent, StoreError

PREFIX = "lmstudio-gateway:"
ACTIVE = PREFIX + "active"
SEQUENCE = PREFIX + "sequence"
EVENTS = PREFIX + "events"
IN_FLIGHT = PREFIX + "in-flight"
LATEST = PREFIX + "latest:"
WORKERS = PREFIX + "workers"
HOST = PREFIX + "host:"
COUNTERS = PREFIX + "counters"
CHANGES = PREFIX + "changes"

#: Seconds that one command may take.
COMMAND_TIMEOUT = 2.0
#: Seconds that the other workers have to acknowledge a change of the active model.
ACKNOWLEDGE_TIMEOUT = 1.0
#: Seconds without a heartbeat after which a worker counts as dead, and between two heartbeats.
DEAD_SECONDS = 5
HEARTBEAT_SECONDS = 1.0
#: Seconds after which the counters of a gateway that no longer shares them expire.
COUNTERS_SECONDS = 15
#: How many of the newest events of a type :meth:`RedisStore.latest` can return.
KEPT_LATEST = 1000

_T = TypeVar("_T")

#: Appends events. KEYS: sequence, events. ARGV: how many events to keep, then type and data of each
#: new event.
_APPEND = """
for i = 2, #ARGV, 2 do
  local id = redis.call('INCR', KEYS[1])
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[1], id .. '-0', 't', ARGV[i], 'd', ARGV[i + 1])
end
return 1
"""
#: Removes dead workers and returns what they had in flight. KEYS: in flight, workers. ARGV: each
#: dead worker and its last heartbeat, which must still be the last.
_TAKE_LOST = """
local dead, lost = {}, {}
for i = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[2], ARGV[i]) == ARGV[i + 1] then
    redis.call('HDEL', KEYS[2], ARGV[i])
    dead[ARGV[i]] = true
  end
end
if next(dead) == nil then return lost end
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local worker = string.match(all[i + 1], '^[^ ]+')
  if dead[worker] then
    redis.call('HDEL', KEYS[1], all[i])
    table.insert(lost, string.sub(all[i + 1], #worker + 2))
  end
end
return lost
"""


def open_redis(url: str) -> redis.Redis:
    """A client for a URL, not connected yet.

    Raises ValueError, without the URL in its message, if the URL is not valid or has an option that
    the client does not know.
    """
    try:
        client = redis.Redis.from_url(
            url, socket_timeout=COMMAND_TIMEOUT, socket_connect_timeout=COMMAND_TIMEOUT
        )
        # the client reports an unknown option no earlier than here
        client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
    except (ValueError, TypeError, redis.RedisError):
        raise ValueError("is not a valid Redis URL, or has an unknown option") from None
    return client


class RedisStore:
    """A :class:`.store.SharedStore` for workers on any number of machines."""

    multi_machine = True

    def __init__(self, url: str) -> None:
        try:
            self._redis: Any = open_redis(url)
        except ValueError as error:
            raise StoreError(f"STATE_URL: {error}") from None
        self.machine = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._worker = f"{self.machine}-{os.getpid()}-{secrets.token_hex(4)}"
        # one key for all workers of a gateway, which share a parent process
        self._counters = f"{COUNTERS}:{socket.gethostname()}:{os.getppid()}"
        #: The last heartbeat of each worker and when it was first seen (time.monotonic()). A worker
        #: whose heartbeat stays the same for too long is dead. An expiry in Redis would depend on
        #: the wall clock.
        self._heartbeats: dict[bytes, tuple[bytes, float]] = {}
        self._checked_at = -math.inf
        # channels are not separated by database number
        database = self._redis.connection_pool.connection_kwargs.get("db") or 0
        self._changes = f"{CHANGES}:{database}"
        self._active: Active | None = None
        self._active_known = Event()
        self._append = self._redis.register_script(_APPEND)
        self._take_lost = self._redis.register_script(_TAKE_LOST)
        self._tasks = [gevent.spawn(self._listen), gevent.spawn(self._send_heartbeats)]

    def active(self) -> Active | None:
        # the first request waits until the active model is known, but only once: without Redis,
        # later requests must not wait again
        if not self._active_known.is_set():
            self._active_known.wait(COMMAND_TIMEOUT)
            self._active_known.set()
        return self._active

    def set_active(self, active: Active | None) -> None:
        nonce = secrets.token_hex(8)
        acknowledgements = f"{PREFIX}ack:{nonce}"

        def change() -> int:
            pipe = self._redis.pipeline()
            pipe.set(ACTIVE, active.to_json() if active else "null")
            pipe.publish(self._changes, nonce)
            return cast(int, pipe.execute()[1])

        subscribers = self._try(change)
        self._active = active
        self._try(lambda: self._await_acknowledgements(acknowledgements, subscribers))

    def append(self, batch: Batch) -> None:
        arguments: list[Any] = [MAX_EVENTS]
        for kind, data in batch.events:
            arguments += [kind, data]

        def write() -> None:
            pipe = self._redis.pipeline()
            self._append(keys=[SEQUENCE, EVENTS], args=arguments, client=pipe)
            for kind, data in batch.events:
                if kind == "inference_complete":
                    pipe.lpush(LATEST + kind, data)
                    pipe.ltrim(LATEST + kind, 0, KEPT_LATEST - 1)
            prefix = f"{self._worker} ".encode()
            if batch.begun:
                pipe.hset(WORKERS, self._worker, time.monotonic())
            for key, data in batch.begun.items():
                pipe.hset(IN_FLIGHT, key, prefix + data)
            if batch.ended:
                pipe.hdel(IN_FLIGHT, *batch.ended)
            pipe.execute()

        self._try(write)

    def after(self, last_id: int, limit: int) -> list[StoredEvent]:
        found = self._try(lambda: self._redis.xrange(EVENTS, f"({last_id}-0", "+", count=limit))
        return [_event(*entry) for entry in found]

    def span(self) -> tuple[int, int]:
        def ends() -> tuple[Any, Any, Any]:
            pipe = self._redis.pipeline()
            pipe.xrange(EVENTS, "-", "+", count=1)
            pipe.xrevrange(EVENTS, "+", "-", count=1)
            pipe.get(SEQUENCE)
            return cast("tuple[Any, Any, Any]", tuple(pipe.execute()))

        first, last, sequence = self._try(ends)
        if not last:
            return int(sequence or 0) + 1, int(sequence or 0)
        return _event(*first[0]).id, _event(*last[0]).id

    def latest(self, event_type: str, count: int) -> list[dict[str, Any]]:
        found = self._try(lambda: self._redis.lrange(LATEST + event_type, 0, count - 1))
        return [json.loads(data) for data in found]

    def wait(self, last_id: int, timeout: float) -> None:
        milliseconds = max(1, int(min(timeout, COMMAND_TIMEOUT / 2) * 1000))
        self._try(lambda: self._redis.xread({EVENTS: f"{last_id}-0"}, count=1, block=milliseconds))

    def in_flight(self) -> list[dict[str, Any]]:
        in_flight = self._try(lambda: self._redis.hgetall(IN_FLIGHT))
        entries = [value.split(b" ", 1) for value in in_flight.values()]
        dead = self._dead_workers()
        found = [json.loads(data) for worker, data in entries if worker not in dead]
        return sorted(found, key=lambda entry: float(entry["startedAt"]))

    def take_lost(self) -> list[dict[str, Any]]:
        dead = self._dead_workers()
        if not dead:
            self.ping()
            return []
        arguments = [text for pair in dead.items() for text in pair]
        lost = self._try(lambda: self._take_lost(keys=[IN_FLIGHT, WORKERS], args=arguments))
        return [json.loads(data) for data in lost]

    def host_state(self, host: str) -> str:
        state = self._try(lambda: self._redis.get(HOST + host))
        return state.decode() if state else "up"

    def set_host_state(self, host: str, state: str) -> bool:
        before = self._try(lambda: self._redis.set(HOST + host, state, get=True))
        return (before.decode() if before else "up") != state

    def share_counters(self, counters: dict[str, float]) -> None:
        text = json.dumps(counters)
        self._try(lambda: self._redis.set(self._counters, text, ex=COUNTERS_SECONDS))

    def other_counters(self) -> list[dict[str, float]]:
        own = self._counters.encode()

        def read() -> list[Any]:
            keys = [key for key in self._redis.scan_iter(COUNTERS + ":*") if key != own]
            return cast("list[Any]", self._redis.mget(keys)) if keys else []

        return [json.loads(text) for text in self._try(read) if text]

    def ping(self) -> None:
        self._try(self._redis.ping)

    def close(self) -> None:
        gevent.killall(self._tasks)
        with suppress(redis.RedisError):
            self._redis.delete(self._counters)
        self._redis.close()

    def _await_acknowledgements(self, acknowledgements: str, subscribers: int) -> None:
        """Wait until every subscriber, this worker among them, has acknowledged a change."""
        with gevent.Timeout(ACKNOWLEDGE_TIMEOUT, False):
            for _ in range(subscribers):
                self._redis.blpop([acknowledgements], timeout=ACKNOWLEDGE_TIMEOUT)
        self._redis.delete(acknowledgements)

    def _listen(self) -> None:
        """Follow the changes of the active model, reconnecting for the life of the worker."""
        while True:
            try:
                pubsub = self._redis.pubsub(ignore_subscribe_messages=False)
                with pubsub:
                    pubsub.subscribe(self._changes)
                    self._follow(pubsub)
            except redis.RedisError:
                gevent.sleep(0.5)

    def _follow(self, pubsub: Any) -> None:
        while True:
            message = pubsub.get_message(timeout=COMMAND_TIMEOUT / 2)
            if message is None:
                continue
            # the first message confirms the subscription: no later change is missed
            if self._active is not None:
                # restore the value if Redis lost its data (a deactivation is stored as "null")
                self._redis.set(ACTIVE, self._active.to_json(), nx=True)
            stored = self._redis.get(ACTIVE)
            self._active = Active.from_json(stored) if stored else None
            self._active_known.set()
            if message["type"] == "message":
                acknowledgements = f"{PREFIX}ack:{message['data'].decode()}"
                pipe = self._redis.pipeline()
                pipe.rpush(acknowledgements, 1)
                pipe.expire(acknowledgements, 10)
                pipe.execute()

    def _send_heartbeats(self) -> None:
        while True:
            with suppress(redis.RedisError):
                pipe = self._redis.pipeline()
                pipe.hset(WORKERS, self._worker, time.monotonic())
                pipe.hgetall(WORKERS)
                self._check_heartbeats(pipe.execute()[1])
            gevent.sleep(HEARTBEAT_SECONDS)

    def _check_heartbeats(self, heartbeats: dict[bytes, bytes]) -> None:
        """Note when the heartbeat of each worker last changed."""
        now = time.monotonic()
        # after an outage of Redis or of this process, every worker gets the full time again
        known = {} if self._heartbeats_outdated() else self._heartbeats
        self._checked_at = now
        self._heartbeats = {
            worker: known[worker] if known.get(worker, (b"",))[0] == heartbeat else (heartbeat, now)
            for worker, heartbeat in heartbeats.items()
        }

    def _heartbeats_outdated(self) -> bool:
        return time.monotonic() - self._checked_at > 2 * HEARTBEAT_SECONDS

    def _dead_workers(self) -> dict[bytes, bytes]:
        """The workers without a new heartbeat for DEAD_SECONDS, with their last one."""
        if self._heartbeats_outdated():
            return {}
        latest = time.monotonic() - DEAD_SECONDS
        return {
            worker: heartbeat
            for worker, (heartbeat, seen_at) in self._heartbeats.items()
            if seen_at < latest
        }

    def _try(self, work: Callable[[], _T]) -> _T:
        try:
            return work()
        except redis.RedisError as error:
            # Redis repeats the arguments of an unknown command: before version 6, the password
            reason = str(error).partition(", with args")[0].rstrip(".")
            raise StoreError(f"The shared state in Redis is unavailable: {reason}.") from None


def _event(entry_id: bytes, fields: dict[bytes, bytes]) -> StoredEvent:
    return StoredEvent(int(entry_id.split(b"-")[0]), fields[b"t"].decode(), fields[b"d"])
