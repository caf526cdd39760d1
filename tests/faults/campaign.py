"""All faults one after the other: ``python -m tests.faults.campaign [--only WORD]``.

Prints the table of README.rst's reliability section; exits 1 when something was lost that must not
be, and says what.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import clock_faults as clock
from tests.faults import outside_faults as outside
from tests.faults import process_faults as process
from tests.faults.stage import Row
from tests.processes import Simulator

#: Faults that need a simulator of their own make it themselves.
FAULTS: dict[str, Callable[[Path, Simulator], Row]] = {
    "drain": process.drain,
    "deadline": process.deadline,
    "reload": process.reload_under_load,
    "worker": process.worker_killed,
    "streams": lambda folder, _: outside.killed_in_streams(folder),
    "answers": lambda folder, _: outside.killed_in_answers(folder),
    "load": lambda folder, _: outside.killed_in_load(folder),
    "frozen": lambda folder, _: outside.frozen(folder),
    "redis": outside.redis_killed,
    "full": lambda folder, simulator: process.state(folder, simulator, "full"),
    "readonly": lambda folder, simulator: process.state(folder, simulator, "readonly"),
    "locked": lambda folder, simulator: process.state(folder, simulator, "locked"),
    "clock": clock.jumps,
    "clock-redis": clock.jumps_with_redis,
    "descriptors": process.descriptors_exhausted,
    "crowd": process.upstream_descriptors_exhausted,
}
_TITLES = ("fault", "what was lost", "time to heal")


def table(rows: list[Row]) -> str:
    """A table of reStructuredText."""
    cells = [_TITLES, *((row.fault, row.lost, row.healed) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
             for line in cells]  # fmt: skip
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help=f"one of {', '.join(FAULTS)}")
    only = parser.parse_args().only
    rows: list[Row] = []
    for name, play in FAULTS.items():
        if only not in ("", name):
            continue
        simulator = Simulator(0, "--pace-ms", "1")
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows.append(play(Path(folder) / name, simulator))
            except pytest.skip.Exception as skipped:
                rows.append(Row(name, "not played", str(skipped), []))
            except Exception as error:
                rows.append(Row(name, "?", "never", [f"{error!r}"[:2000]]))
            finally:
                simulator.stop()
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    problems = [f"{row.fault}: {problem}" for row in rows for problem in row.problems]
    for problem in problems:
        print(f"NOT AS PROMISED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
