"""Measures how long the gateway serves slow clients: ``python -m tests.faults.slow``.

Each client is named after a part of a request, of which it sends one byte every half second. The
gateway must close every connection, otherwise the exit status is 1. Takes about two minutes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.processes import Gateway, Simulator, default_signals_for_children
from tests.wire.client import Client
from tests.wire.test_slow import SLOW

PACE = 0.5
#: Seconds after which a connection counts as never closed.
LIMIT = 150.0


def trickle(port: int, kind: str) -> tuple[str, float | None]:
    """The status that a slow client got, and the seconds until its connection was closed."""
    beginning, rest = SLOW[kind]
    began = time.monotonic()
    received = b""
    with Client(port) as client:
        client.send(beginning)
        for at in range(int(LIMIT / PACE)):
            client.send(rest[at % len(rest) :][:1])
            client.sock.settimeout(PACE)
            try:
                data = client.sock.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            if not data:
                return _status(received), time.monotonic() - began
            received += data
    return _status(received), None


def _status(received: bytes) -> str:
    return received.split(b" ", 2)[1].decode() if received else "no response"


def main() -> int:
    default_signals_for_children()
    simulator = Simulator()
    with tempfile.TemporaryDirectory() as folder:
        gateway = Gateway(Path(folder), simulator.url)
        try:
            with ThreadPoolExecutor(len(SLOW)) as pool:
                ends = list(pool.map(lambda kind: trickle(gateway.port, kind), SLOW))
        finally:
            gateway.stop()
            simulator.stop()
    for kind, (status, ended) in zip(SLOW, ends, strict=True):
        when = "never closed" if ended is None else f"closed after {ended:.0f} s"
        print(f"slow {kind}: {status}, {when}")
    return 1 if any(ended is None for _, ended in ends) else 0


if __name__ == "__main__":
    sys.exit(main())
