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

    It distinguishes the process from a later one with the same number. A dead process has -1; every
    living one has 0 on systems without /proc.
    """
    if sys.platform == "win32":
        # os.kill(pid, 0) would end the process; the gateway has a single one there
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
