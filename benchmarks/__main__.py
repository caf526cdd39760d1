"""Measure the gateway, the bare upstream, nginx and other proxies side by side.

    python -m benchmarks [--rounds 5] [--seconds 2] [--only requests,streams,...]
                         [--command 'NAME=command with {port} {upstream} {key}']

Needs nginx and wrk (Debian packages). Everything runs on loopback and shares this machine's cores,
so absolute figures say little. A round measures all targets in turn and each ratio compares figures
of one round; the output has the median of the rounds, and their range, which shows the noise.
benchmarks/README.rst describes how to install other proxies to compare with.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks import measures
from benchmarks.measures import Requests, median
from benchmarks.targets import Target, Testbed
from tests.processes import default_signals_for_children

CONNECTIONS = (1, 16, 64)
PARTS = (
    "requests",
    "streams",
    "first-byte",
    "disconnects",
    "memory",
    "growth",
    "log",
    "readers",
    "start",
)


class Run:
    """One run over all rounds."""

    def __init__(self, testbed: Testbed, targets: list[Target], rounds: int, seconds: int) -> None:
        self.testbed, self.targets = testbed, targets
        self.rounds, self.seconds = rounds, seconds
        self.gateway = next(target for target in targets if target.name == "gateway")

    def requests(self) -> None:
        for connections in CONNECTIONS:
            found: dict[str, list[Requests]] = {target.name: [] for target in self.targets}
            for target in self._all_rounds():
                one = measures.requests(target, self.testbed.folder, connections, self.seconds)
                found[target.name].append(one)
            own = [one.per_second for one in found["gateway"]]
            _table(
                f"Plain requests, {connections} connections",
                ("\\", "requests/s", "gateway's ratio", "CPU ms", "median ms", "p99 ms"),
                *((name, *self._requests_row(own, rounds)) for name, rounds in found.items()),
            )

    def _requests_row(self, own: list[float], found: list[Requests]) -> tuple[str, ...]:
        rates = [one.per_second for one in found]
        return (
            f"{median(rates):.0f}",
            _ratio(own, rates),
            f"{median([one.cpu_ms for one in found]):.3f}",
            f"{median([one.median_ms for one in found]):.2f}",
            f"{median([one.p99_ms for one in found]):.2f}",
        )

    def streams(self) -> None:
        for streams in CONNECTIONS:
            found: dict[str, list[float]] = {target.name: [] for target in self.targets}
            for target in self._all_rounds():
                found[target.name].append(measures.fast_events(target, streams, self.seconds))
            own = found["gateway"]
            rows = [(name, f"{median(one):.0f}", _ratio(own, one)) for name, one in found.items()]
            title = f"Events without pauses, {streams} streams"
            _table(title, ("\\", "events/s", "gateway's ratio"), *rows)

    def first_byte(self) -> None:
        found: dict[str, list[float]] = {target.name: [] for target in self.targets}
        for target in self._all_rounds():
            found[target.name] += measures.first_bytes_ms(target, 50)
        direct = sorted(found["upstream"])
        rows = []
        for name, times in found.items():
            ordered = sorted(times)
            added = [ordered[int(q * (len(ordered) - 1))] - direct[int(q * (len(direct) - 1))]
                     for q in (0.5, 0.99)]  # fmt: skip
            rows.append((name, *(f"{one:.2f}" for one in added)))
        title = "First byte of a stream, in addition to the upstream's time"
        _table(title, ("\\", "median ms", "p99 ms"), *rows)

    def disconnects(self) -> None:
        rows = []
        for target in self.targets:
            cells = []
            for prefill in (False, True):
                times = measures.disconnects_ms(
                    target, self.testbed.paced_port, 16, prefill=prefill
                )
                noticed = [time for time in times if time != float("inf")]
                middle = f"{median(noticed):.1f}" if noticed else "never"
                cells.append(f"{middle} ({len(noticed)} of {len(times)})")
            rows.append((target.name, *cells))
        title = "Time until the upstream notices that a client has disconnected"
        _table(title, ("\\", "mid-stream ms", "in prefill ms"), *rows)

    def memory(self) -> None:
        rows = [(one.name, f"{one.process.pss_mib():.0f}") for one in self.targets if one.process]
        _table("Memory of all processes (PSS)", ("\\", "MiB"), *rows)

    def growth(self) -> None:
        sizes = (1_000, 10_000, 100_000, 1_000_000)
        found: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(self.rounds):
            for size in sizes:
                one = measures.requests(self.gateway, self.testbed.folder, 4, self.seconds, size)
                found[size].append(one.cpu_ms)
        rows = []
        base = median(found[sizes[0]])
        for size in sizes:
            each = median(found[size])
            slope = (each - base) / (size - 1000) * 1e6 if size > 1000 else 0.0
            rows.append((str(size), f"{each:.3f}", f"{slope:.2f}"))
        head = ("bytes", "CPU ms", "us per KB beyond the first")
        _table("A request whose body grows", head, *rows)

    def log(self) -> None:
        """A gateway with a full event log compared with one that has just started."""
        full, empty = [], []
        for number in range(self.rounds):
            fresh = self.testbed.gateway(f"fresh-{number}")
            measures.requests(fresh, self.testbed.folder, 4, 1)  # warm-up
            for target, found in ((self.gateway, full), (fresh, empty)):
                found.append(measures.requests(target, self.testbed.folder, 4, 1).cpu_ms)
            self.testbed.remove(fresh)
        print(f"\nCPU of a request, with 10,000 events in the log / none: {_ratio(full, empty)}")

    def readers(self) -> None:
        """Plain requests with and without 20 readers of the event stream."""
        with_readers: list[Requests] = []
        without: list[Requests] = []
        for _ in range(self.rounds):
            without.append(self._plain())
            with measures.event_readers(self.gateway, 20):
                with_readers.append(self._plain())
        rates = [[one.per_second for one in found] for found in (with_readers, without)]
        costs = [[one.cpu_ms for one in found] for found in (with_readers, without)]
        print(f"\nWith 20 event readers / none: requests/s {_ratio(*rates)}, CPU {_ratio(*costs)}")

    def _plain(self) -> Requests:
        return measures.requests(self.gateway, self.testbed.folder, 16, self.seconds)

    def start(self) -> None:
        times = [measures.start_seconds(self.testbed.folder) for _ in range(self.rounds)]
        print(f"\nFirst response to /health after {median(times):.2f} s ({_range(times)})")

    def _all_rounds(self) -> list[Target]:
        """All targets of each round, in reverse order in every other one."""
        order = []
        for number in range(self.rounds):
            order += self.targets if number % 2 == 0 else self.targets[::-1]
        return order


def main() -> None:
    default_signals_for_children()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"comma-separated, from {', '.join(PARTS)}"
    )
    parser.add_argument("--command", action="append", default=[], metavar="NAME=COMMAND")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        testbed = Testbed(Path(folder))
        try:
            targets = [testbed.upstream, testbed.nginx(), testbed.gateway()]
            for proxy in options.command:
                name, _, command = proxy.partition("=")
                targets.append(testbed.command(name, command))
            run = Run(testbed, targets, options.rounds, options.seconds)
            for part in options.only.split(","):
                getattr(run, part.replace("-", "_"))()
        finally:
            testbed.stop()


def _ratio(own: list[float], others: list[float]) -> str:
    ratios = [one / other for one, other in zip(own, others, strict=True)]
    return f"{median(ratios):.3f} ({_range(ratios)})"


def _range(values: list[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def _table(title: str, *rows: tuple[str, ...]) -> None:
    """Print a simple table in reStructuredText; the first row is its header."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    rule = "  ".join("=" * width for width in widths)
    print(f"\n{title}\n")
    for number, row in enumerate(rows):
        if number < 2:
            print(rule)
        print(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    print(rule, flush=True)


if __name__ == "__main__":
    main()
