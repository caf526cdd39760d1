"""The cost of a plain request, in a unit that hardly depends on the machine and its load.

    python -m benchmarks.regression [--rounds 5]

It is the gateway's CPU time per request, divided by the CPU time that a fixed piece of Python takes
in this process at the same time. CI prints it for information: it varies by about 5 % from run to
run, so a change of 15 % or more deserves a look. Needs nginx and wrk.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from benchmarks import measures
from benchmarks.measures import median
from benchmarks.targets import Testbed
from tests.processes import default_signals_for_children


def yardstick() -> float:
    """CPU milliseconds of work similar to the gateway's: JSON, dictionaries, byte strings."""
    began = time.process_time()
    for number in range(2000):
        text = json.dumps({"number": number, "words": ["a", "b"] * 10, "nested": {"x": 1.5}})
        found = json.loads(text)
        head = "".join(f"{name}: {found[name]}\r\n" for name in found).encode()
        assert [line.partition(b": ") for line in head.split(b"\r\n")]
    return (time.process_time() - began) * 1000


def main() -> None:
    default_signals_for_children()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        testbed = Testbed(Path(folder))
        try:
            gateway = testbed.gateway(WEB_CONCURRENCY="1")
            measures.requests(gateway, testbed.folder, 4, 1)  # warm-up
            found = []
            for _ in range(rounds):
                before = yardstick()
                cost = measures.requests(gateway, testbed.folder, 4, 1).cpu_ms
                found.append(cost / (before + yardstick()) * 2 * 1000)
        finally:
            testbed.stop()
    low, high = min(found), max(found)
    print(f"a request costs {median(found):.2f} thousandths of a yardstick ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
    main()
