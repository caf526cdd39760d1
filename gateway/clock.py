"""Timestamps, deadlines, and how long an operation has been in flight."""

from __future__ import annotations

import socket
import time
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

#: The members of an operation in flight from which :func:`elapsed_ms` computes its duration.
CLOCKS = ("startedAt", "steady", "machine")


class Moment(NamedTuple):
    """A point in time by both clocks: the wall clock (s since 1970), which may jump, and the steady
    clock of this machine."""

    wall: float
    steady: float

    @classmethod
    def now(cls) -> Moment:
        return cls(time.time(), time.monotonic())


def timestamp(moment: float) -> str:
    """Format seconds since 1970 as ISO 8601, in UTC and with milliseconds."""
    milliseconds = int(moment * 1000)
    return f"{_second(milliseconds // 1000)}.{milliseconds % 1000:03}Z"


@lru_cache(maxsize=16)
def _second(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def elapsed_ms(running: dict[str, Any]) -> int:
    """Milliseconds for which an operation has been in flight.

    Operations of this machine are measured with the steady clock, which all its workers share,
    those of another machine with the wall clocks of both.
    """
    if running.get("machine") == MACHINE:
        seconds = time.monotonic() - float(running["steady"])
    else:
        seconds = time.time() - float(running["startedAt"])
    return max(0, round(seconds * 1000))


def remaining(deadline: float | None) -> float | None:
    """Seconds until a deadline, which is a time.monotonic(); None without a deadline.

    The result is never 0, which means "don't wait" to a socket.
    """
    return None if deadline is None else max(0.001, deadline - time.monotonic())


def _machine() -> str:
    """Identifies this machine, until its next boot if the kernel provides a boot id."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


MACHINE = _machine()
