"""The shared state in Redis: several workers on several machines.

Events are a Redis Stream whose ids are whole numbers handed out by one Lua script, so that they are
strictly increasing and without holes. A change of the active model is announced by publish, and the
announcing worker waits until each worker that heard it has said so: from its answer on, all agree.
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
COUNTERS = PREFIX + "counters"
CHANGES = PREFIX + "changes"

#: Seconds for one command.
COMMAND_TIMEOUT = 2.0
#: Seconds that the other workers get to notice a change of the active model.
AGREE_TIMEOUT = 1.0
#: Seconds without a sign of life after which a worker counts as dead, and between two signs.
ALIVE_SECONDS = 5
SIGN_SECONDS = 1.0
#: Counters of a gateway that has not told any for this long are not added any more.
COUNTERS_SECONDS = 15
#: How many of the newest events of a type can be asked for.
KEPT_LATEST = 1000

_T = TypeVar("_T")

#: KEYS: sequence, events. ARGV: most events, then type and data of each event.
_APPEND = """
for i = 2, #ARGV, 2 do
  local id = redis.call('INCR', KEYS[1])
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[1], id .. '-0', 't', ARGV[i], 'd', ARGV[i + 1])
end
return 1
"""
#: Removes dead workers and returns what they had in flight. KEYS: in flight, workers. ARGV: each
#: dead worker and its last sign of life, which must still be the last.
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


class RedisStore:
    """See :class:`gateway.store.SharedStore`."""

    many_machines = True

    def __init__(self, url: str) -> None:
        try:
            self._redis: Any = redis.Redis.from_url(
                url, socket_timeout=COMMAND_TIMEOUT, socket_connect_timeout=COMMAND_TIMEOUT
            )
        except ValueError:
            raise StoreError("STATE_URL is not a Redis URL") from None
        self.machine = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._worker = f"{self.machine}-{os.getpid()}-{secrets.token_hex(4)}"
        # one for all workers of a gateway: they are children of one master
        self._counters = f"{COUNTERS}:{socket.gethostname()}:{os.getppid()}"
        #: Of each worker the newest sign of life and when it was new (time.monotonic()): whoever
        #: shows the same for too long is dead. Redis' own expiry would go by its wall clock.
        self._signs: dict[bytes, tuple[bytes, float]] = {}
        self._looked = -math.inf
        # publish knows no database numbers
        database = self._redis.connection_pool.connection_kwargs.get("db") or 0
        self._changes = f"{CHANGES}:{database}"
        self._active: Active | None = None
        self._listening = Event()
        self._append = self._redis.register_script(_APPEND)
        self._take_lost = self._redis.register_script(_TAKE_LOST)
        self._tasks = [gevent.spawn(self._listen), gevent.spawn(self._show_life)]

    def active(self) -> Active | None:
        # the first request of a worker waits until the worker knows; a Redis that is away is
        # waited for once only
        if not self._listening.is_set():
            self._listening.wait(COMMAND_TIMEOUT)
            self._listening.set()
        return self._active

    def set_active(self, active: Active | None) -> None:
        nonce = secrets.token_hex(8)
        acknowledgements = f"{PREFIX}ack:{nonce}"

        def change() -> int:
            pipe = self._redis.pipeline()
            pipe.set(ACTIVE, active.to_json() if active else "null")
            pipe.publish(self._changes, nonce)
            return cast(int, pipe.execute()[1])

        heard = self._try(change)
        self._active = active
        self._try(lambda: self._await_all(acknowledgements, heard))

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
        running = self._try(lambda: self._redis.hgetall(IN_FLIGHT))
        entries = [value.split(b" ", 1) for value in running.values()]
        dead = self._dead()
        found = [json.loads(data) for worker, data in entries if worker not in dead]
        return sorted(found, key=lambda entry: float(entry["startedAt"]))

    def take_lost(self) -> list[dict[str, Any]]:
        dead = self._dead()
        if not dead:
            self.ping()
            return []
        signs = [text for pair in dead.items() for text in pair]
        lost = self._try(lambda: self._take_lost(keys=[IN_FLIGHT, WORKERS], args=signs))
        return [json.loads(data) for data in lost]

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

    def _await_all(self, acknowledgements: str, heard: int) -> None:
        """Wait for everybody who heard of a change (ourselves among them)."""
        with gevent.Timeout(AGREE_TIMEOUT, False):
            for _ in range(heard):
                self._redis.blpop([acknowledgements], timeout=AGREE_TIMEOUT)
        self._redis.delete(acknowledgements)

    def _listen(self) -> None:
        """Follow the changes of the active model, for the life of the worker."""
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
            # the subscription itself comes as a message: from here on nothing is missed
            if self._active is not None:
                # a Redis that lost its data gets it back (a deactivation is stored as "null")
                self._redis.set(ACTIVE, self._active.to_json(), nx=True)
            stored = self._redis.get(ACTIVE)
            self._active = Active.from_json(stored) if stored else None
            self._listening.set()
            if message["type"] == "message":
                acknowledgements = f"{PREFIX}ack:{message['data'].decode()}"
                pipe = self._redis.pipeline()
                pipe.rpush(acknowledgements, 1)
                pipe.expire(acknowledgements, 10)
                pipe.execute()

    def _show_life(self) -> None:
        while True:
            with suppress(redis.RedisError):
                pipe = self._redis.pipeline()
                pipe.hset(WORKERS, self._worker, time.monotonic())
                pipe.hgetall(WORKERS)
                self._look(pipe.execute()[1])
            gevent.sleep(SIGN_SECONDS)

    def _look(self, signs: dict[bytes, bytes]) -> None:
        """Note when each worker's sign of life changed."""
        now = time.monotonic()
        # after a while in which Redis or this process was away, all get time to show life anew
        known = {} if self._is_blind() else self._signs
        self._looked = now
        self._signs = {
            worker: known[worker] if known.get(worker, (b"",))[0] == sign else (sign, now)
            for worker, sign in signs.items()
        }

    def _is_blind(self) -> bool:
        return time.monotonic() - self._looked > 2 * SIGN_SECONDS

    def _dead(self) -> dict[bytes, bytes]:
        """The workers without a new sign of life for too long, and their last ones."""
        if self._is_blind():
            return {}
        latest = time.monotonic() - ALIVE_SECONDS
        return {worker: sign for worker, (sign, new) in self._signs.items() if new < latest}

    def _try(self, work: Callable[[], _T]) -> _T:
        try:
            return work()
        except redis.RedisError as error:
            fault = str(error).rstrip(".")
            raise StoreError(f"The shared state in Redis can't be used: {fault}.") from None


def _event(entry_id: bytes, fields: dict[bytes, bytes]) -> StoredEvent:
    return StoredEvent(int(entry_id.split(b"-")[0]), fields[b"t"].decode(), fields[b"d"])
