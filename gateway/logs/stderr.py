"""Standard error behind a bounded queue, so that a reader who stops reading never stops a worker.

Everything that a worker logs goes through :func:`write`. A native thread does the writing from
:func:`start` on; before, and in gunicorn's master, which must not have threads when it forks, each
text is written at once.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections import deque
from typing import Any

import gevent.monkey

#: Texts that wait to be written, and their bytes; beyond either, new texts are dropped and counted.
MAX_TEXTS = 10_000
MAX_BYTES = 4 * 1024 * 1024
#: Seconds that a process waits at its exit for what is queued.
FLUSH_SECONDS = 2.0
#: Bytes of one write.
_WRITE_BYTES = 65536

# gevent's own would run in the event loop, which a blocked write must not stop
_start_thread: Any = gevent.monkey.get_original("_thread", "start_new_thread")
_new_lock: Any = gevent.monkey.get_original("_thread", "allocate_lock")
_sleep: Any = gevent.monkey.get_original("time", "sleep")
_select: Any = gevent.monkey.get_original("select", "select")


class Queue:
    """Texts on their way to a file descriptor, which a native thread writes."""

    def __init__(self, descriptor: int) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._texts: deque[bytes] = deque()
        self._bytes = 0
        self._lock = _new_lock()
        #: Held while there is nothing to write.
        self._idle = _new_lock()
        self._idle.acquire()
        self._writing = False
        _start_thread(self._run, ())

    def put(self, text: str) -> None:
        """Queue a text, or drop it if too much waits. Never blocks for longer than a copy takes."""
        data = text.encode("utf-8", "backslashreplace")
        with self._lock:
            if len(self._texts) >= MAX_TEXTS or self._bytes + len(data) > MAX_BYTES:
                self.dropped += 1
                return
            self._texts.append(data)
            self._bytes += len(data)
            if self._idle.locked():
                self._idle.release()

    def flush(self, timeout: float) -> bool:
        """Wait until everything is written; returns whether it is."""
        deadline = time.monotonic() + timeout
        while self._texts or self._writing:
            if time.monotonic() >= deadline:
                return False
            _sleep(0.005)
        return True

    def _run(self) -> None:
        while True:
            self._idle.acquire()
            while data := self._take():
                self._write(data)
                self._writing = False

    def _take(self) -> bytes:
        """Everything that is queued, and a line about what was dropped."""
        with self._lock:
            data = b"".join(self._texts)
            if self.dropped:
                data += b"... %d log lines were dropped, as nobody read them\n" % self.dropped
                self.dropped = 0
            self._writing = bool(data)
            self._texts.clear()
            self._bytes = 0
            return data

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._descriptor, view[:_WRITE_BYTES]) :]
            except BlockingIOError:
                _select([], [self._descriptor], [], 1.0)
            except OSError:
                return  # the reader is gone


#: The queue of this process, by its id: a forked process has the parent's queue but not its thread.
_queues: dict[int, Queue] = {}


def start() -> None:
    """Write through the queue from now on. Called in the worker, after the fork."""
    if os.getpid() not in _queues:
        sys.stderr.flush()
        _queues[os.getpid()] = Queue(sys.stderr.fileno())
        atexit.register(flush)


def write(text: str) -> None:
    """Write a text of whole lines to standard error, without waiting once :func:`start` was
    called."""
    queue = _queues.get(os.getpid())
    if queue is not None:
        queue.put(text)
        return
    sys.stderr.write(text)
    sys.stderr.flush()


def flush(timeout: float = FLUSH_SECONDS) -> bool:
    """Wait until everything is written, for a limited time; returns whether it is."""
    queue = _queues.get(os.getpid())
    return queue is None or queue.flush(timeout)
