"""Runs 500 streams of 200 numbered tokens, 100 ms apart, on two workers: are all complete and in
order, and what do they cost?

``python -m tests.soak.streams [--streams 500] [--tokens 200] [--pace-ms 100]``; exits 1
on an error.
"""

from gevent import monkey

monkey.patch_all()

import argparse  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import gevent  # noqa: E402

from tests.processes import Gateway, Simulator, default_signals_for_children  # noqa: E402
from tests.raw_http import counted, exchange, request  # noqa: E402
from tests.soak.traffic import CHAT, allow_many_files, chat, memory  # noqa: E402

#: Seconds over which the streams are started.
RAMP = 4.0


class Load:
    """Streams that run at the same time against one port; ``ttfb`` is in ms."""

    def __init__(self, port: int, tokens: int, pace_ms: float) -> None:
        self.port, self.tokens, self.pace_ms = port, tokens, pace_ms
        self.ttfb: list[float] = []
        self.errors: list[str] = []

    def run(self, streams: int) -> list[gevent.Greenlet]:
        """Start the streams, spread over ``RAMP``."""
        return [gevent.spawn_later(RAMP * n / streams, self.one) for n in range(streams)]

    def one(self) -> None:
        # the header sets the same pace for both sides of the comparison
        data = request("POST", CHAT, chat(self.tokens, True), {"Pace-Ms": self.pace_ms})
        began, first = time.perf_counter(), []

        def arrived() -> None:
            if not first:
                first.append((time.perf_counter() - began) * 1000)

        try:
            response = exchange(self.port, data, arrived)
        except OSError as error:
            self.errors.append(repr(error))
            return
        self.ttfb += first
        if counted(response) != list(range(1, self.tokens + 1)):
            self.errors.append(
                f"{len(counted(response))} tokens or out of order: {response[-200:]!r}"
            )
        elif not response.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            self.errors.append(f"no proper end: {response[-200:]!r}")

    def summary(self) -> str:
        return f"median {statistics.median(self.ttfb):.1f} ms, p99 {p99(self.ttfb):.1f} ms"


def p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


def compare(direct: Load, through: Load, what: str) -> None:
    """Print how much time to first byte the gateway adds."""
    median = statistics.median(through.ttfb) - statistics.median(direct.ttfb)
    added = f"median {median:+.2f} ms, p99 {p99(through.ttfb) - p99(direct.ttfb):+.2f} ms"
    print(f"time to first byte, {what}: direct {direct.summary()}; gateway {through.summary()}")
    print(f"  added: {added}")


def main() -> int:
    default_signals_for_children()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--pace-ms", type=float, default=100)
    options = parser.parse_args()
    allow_many_files()
    simulator = Simulator()
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        gateway = Gateway(Path(folder), simulator.url, WEB_CONCURRENCY=2)
        ports = (simulator.port, gateway.port)
        try:
            for port in ports * 20:  # let every worker import, connect and load the model
                Load(port, 2, 0).one()
            quiet = [Load(port, 2, 0) for port in ports]
            for _ in range(300):
                for load in quiet:
                    load.one()
            compare(*quiet, "one stream at a time")
            simulator.reset()
            busy = [Load(port, options.tokens, options.pace_ms) for port in ports]
            gevent.joinall(busy[0].run(options.streams))
            simulator.reset()
            _, before = memory(gateway)
            running = busy[1].run(options.streams)
            gevent.sleep(RAMP + options.tokens * options.pace_ms / 2000)
            _, during = memory(gateway)
            gevent.joinall(running)
            _, after = memory(gateway)
            compare(*busy, f"{options.streams} streams at once")
            errors = [error for load in (*quiet, *busy) for error in load.errors]
        finally:
            gateway.stop()
            simulator.stop()
    each = (during - before) * 1024 / options.streams
    print(f"PSS: {before:.1f} MiB idle, {during:.1f} MiB during, {after:.1f} MiB afterwards")
    print(f"  {each:.1f} KiB per stream")
    print(f"{options.streams} streams of {options.tokens} tokens: {len(errors)} errors")
    for error in errors[:20]:
        print(f"  {error}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
