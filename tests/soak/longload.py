"""Loads for 200 s behind nginx with deploy/nginx.conf, as JSON and as an event stream.

``python -m tests.soak.longload [--seconds 200]``; exits 1 when a response is cut off.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests

from tests.nginx import Nginx
from tests.processes import Gateway, Simulator, default_signals_for_children

FORMS = {"plain": ("*/*", '"status"'), "events": ("text/event-stream", "model_load_complete")}


def load(url: str, form: str, timeout: float) -> str:
    """Load a model; returns a line about the outcome."""
    accept, mark = FORMS[form]
    began = time.monotonic()
    body = {"modelKey": "qwen2-1.5b-instruct", "instanceId": form}
    response = requests.post(
        f"{url}/admin/models/load", json=body, headers={"Accept": accept}, timeout=timeout
    )
    took = time.monotonic() - began
    complete = response.status_code == 200 and mark in response.text and '"loaded"' in response.text
    return f"{form}: {response.status_code} in {took:.1f} s, {'loaded' if complete else 'LOST'}"


def main() -> int:
    default_signals_for_children()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=200)
    options = parser.parse_args()
    simulator = Simulator()
    simulator.faults(load_ms=int(options.seconds * 1000))
    with tempfile.TemporaryDirectory() as folder:
        gateway = Gateway(Path(folder), simulator.url, WEB_CONCURRENCY=1)
        nginx = Nginx(Path(folder) / "nginx", gateway.url)
        try:
            with ThreadPoolExecutor() as pool:
                outcomes = list(
                    pool.map(lambda form: load(nginx.url, form, options.seconds + 60), FORMS)
                )
        finally:
            nginx.stop()
            gateway.stop()
            simulator.stop()
    print(*outcomes, sep="\n")
    return 1 if any("LOST" in line for line in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
