"""Identifies processes beyond their number, which a later process may reuse."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

#: The birth of this process on Windows, where /proc does not exist.
_BORN = time.time_ns()


def birth(pid: int) -> int:
    """When a process started, in clock ticks since boot (``starttime`` of proc(5)).

    It distinguishes the process from a later one with the same number. Returns -1 for a dead
    process, and 0 for every living one on systems without /proc.
    """
    if sys.platform == "win32":
        # os.kill(pid, 0) would end the process there, where the gateway is a single process
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
    # the process name, in parentheses, may contain anything; starttime is the 20th field after it
    return int(status[status.rindex(")") + 2 :].split()[19])
