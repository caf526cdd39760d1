"""Sends a request about every 5 s, which is when LM Studio closes idle connections: none may fail.

``python -m tests.soak.keepalive [--seconds 60] [--gap 5.0] [--spread 0.2]``; exits 1 on a failure.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import requests

from tests.processes import Gateway, Simulator, default_signals_for_children
from tests.soak.traffic import CHAT, chat


def main() -> int:
    default_signals_for_children()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--gap", type=float, default=5.0)
    parser.add_argument("--spread", type=float, default=0.2)
    options = parser.parse_args()
    simulator = Simulator(0, "--pace-ms", "0")
    failures = []
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        # one worker, so that each request finds the connection of the previous one
        gateway = Gateway(Path(folder), simulator.url, WEB_CONCURRENCY=1)
        try:
            end = time.monotonic() + options.seconds
            while time.monotonic() < end:
                stream = count % 2 == 1
                gap = random.uniform(options.gap - options.spread, options.gap + options.spread)
                count += 1
                try:
                    response = gateway.post(CHAT, chat(3, stream))
                    if response.status_code != 200 or "3 " not in response.text:
                        failures.append(f"{response.status_code} {response.text[:200]}")
                except requests.RequestException as error:
                    failures.append(repr(error))
                time.sleep(gap)
        finally:
            gateway.stop()
            simulator.stop()
    print(f"{count} requests, {len(failures)} failures")
    for line in failures:
        print(f"  {line}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
