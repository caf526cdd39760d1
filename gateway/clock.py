"""Timestamps, deadlines, and how long something has been in flight."""

from __future__ import annotations

import socket
import time
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

#: By what it is told how long something is in flight; see :func:`elapsed_ms`.
CLOCKS = ("startedAt", "steady", "machine")


class Moment(NamedTuple):
    """Now, by the wall clock (s since 1970), which may jump, and by the machine's steady one."""

    wall: float
    steady: float

    @classmethod
    def now(cls) -> Moment:
        return cls(time.time(), time.monotonic())


def timestamp(moment: float) -> str:
    """ISO 8601 in UTC with milliseconds."""
    milliseconds = int(moment * 1000)
    return f"{_second(milliseconds // 1000)}.{milliseconds % 1000:03}Z"


@lru_cache(maxsize=16)
def _second(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def elapsed_ms(running: dict[str, Any]) -> int:
    """How long an operation in flight has run: by the steady clock if it runs on this machine, of
    which every worker has the same, else by the wall clocks."""
    if running.get("machine") == MACHINE:
        seconds = time.monotonic() - float(running["steady"])
    else:
        seconds = time.time() - float(running["startedAt"])
    return max(0, round(seconds * 1000))


def remaining(deadline: float | None) -> float | None:
    """Seconds until a deadline (of time.monotonic()), never quite 0: sockets take that to mean
    "don't wait"; None when there is no deadline."""
    return None if deadline is None else max(0.001, deadline - time.monotonic())


def _machine() -> str:
    """What names this machine since its last start."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


MACHINE = _machine()
