"""Which processes are alive, told apart from later ones with the same number."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

#: What tells this process from another one with its number, on Windows.
_BORN = time.time_ns()


def birth(pid: int) -> int:
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
