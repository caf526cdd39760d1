"""Runs all faults, one after another: ``python -m tests.faults.campaign [--only NAME]``.

Prints the table in the reliability section of README.rst. If anything is lost that must not be
lost, it prints what, and exits with status 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import client_faults as client
from tests.faults import clock_faults as clock
from tests.faults import dependency_faults as dependency
from tests.faults import network_faults as network
from tests.faults import process_faults as process
from tests.faults.harness import Row
from tests.processes import Simulator, default_signals_for_children

#: The simulator is for faults that do not start their own.
FAULTS: dict[str, Callable[[Path, Simulator], Row]] = {
    "drain": process.drain,
    "deadline": process.deadline,
    "reload": process.reload_under_load,
    "worker": process.worker_killed,
    "streams": lambda folder, _: dependency.killed_during_streams(folder),
    "requests": lambda folder, _: dependency.killed_while_requests_wait(folder),
    "load": lambda folder, _: dependency.killed_during_load(folder),
    "frozen": lambda folder, _: dependency.frozen(folder),
    "unread": lambda folder, _: network.never_reads(folder),
    "network-streams": network.network_down_during_streams,
    "network-load": network.network_down_during_load,
    "redis": dependency.redis_killed,
    "full": lambda folder, simulator: process.state(folder, simulator, "full"),
    "readonly": lambda folder, simulator: process.state(folder, simulator, "readonly"),
    "locked": lambda folder, simulator: process.state(folder, simulator, "locked"),
    "clock": clock.jumps,
    "clock-redis": clock.jumps_with_redis,
    "descriptors": process.descriptors_exhausted,
    "upstream-descriptors": process.upstream_descriptors_exhausted,
    "slow-reader": client.slow_reader,
    "unread-events": client.unread_events,
    "flood": client.flood_with_full_stderr,
    "abandoned": client.abandoned,
    "silent": client.silent,
}
_TITLES = ("fault", "lost", "recovery")


def table(rows: list[Row]) -> str:
    """Format rows as a reStructuredText table."""
    cells = [_TITLES, *((row.fault, row.lost, row.recovery) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
             for line in cells]  # fmt: skip
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def main() -> int:
    default_signals_for_children()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help=f"one of {', '.join(FAULTS)}")
    only = parser.parse_args().only
    rows: list[Row] = []
    for name, run in FAULTS.items():
        if only not in ("", name):
            continue
        simulator = Simulator(0, "--pace-ms", "1")
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows.append(run(Path(folder) / name, simulator))
            except pytest.skip.Exception as skipped:
                rows.append(Row(name, "skipped", str(skipped), []))
            except Exception as error:
                rows.append(Row(name, "?", "never", [f"{error!r}"[:2000]]))
            finally:
                simulator.stop()
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    problems = [f"{row.fault}: {problem}" for row in rows for problem in row.problems]
    for problem in problems:
        print(f"PROBLEM: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
