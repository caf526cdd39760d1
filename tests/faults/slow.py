"""How long clients that trickle are borne: ``python -m tests.faults.slow``, about two minutes.

Each sends a byte every half second of what its name says. All must be ended; exits 1 otherwise.
"""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.processes import Gateway, Simulator
from tests.wire.client import Client
from tests.wire.test_slow import SLOW

PACE = 0.5
#: Seconds after which a client that is still there is there for ever.
LIMIT = 150.0


def trickle(port: int, kind: str) -> tuple[str, float | None]:
    """What the client was told, and when its connection was ended."""
    begin, rest = SLOW[kind]
    began = time.monotonic()
    heard = b""
    with Client(port) as client:
        client.send(begin)
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
                status = heard.split(b" ", 2)[1].decode() if heard else "nothing"
                return status, time.monotonic() - began
            heard += data
    return heard.split(b" ", 2)[1].decode() if heard else "nothing", None


def main() -> int:
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
        when = "never ended" if ended is None else f"ended after {ended:.0f} s"
        print(f"slow {kind}: told {status}, {when}")
    return 1 if any(ended is None for _, ended in ends) else 0


if __name__ == "__main__":
    sys.exit(main())
