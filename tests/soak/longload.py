"""A load that takes 200 s, behind nginx with deploy/nginx.conf: as JSON and as an event stream.

``python -m tests.soak.longload [--seconds 200]``; exits 1 when nginx, or anybody, cuts one of them.
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
from tests.processes import Gateway, Simulator

FORMS = {"plain": ("*/*", '"status"'), "events": ("text/event-stream", "model_load_complete")}


def load(url: str, form: str, patience: float) -> str:
    """Load, and say how it went."""
    accept, mark = FORMS[form]
    began = time.monotonic()
    body = {"modelKey": "qwen2-1.5b-instruct", "instanceId": form}
    answer = requests.post(
        f"{url}/admin/models/load", json=body, headers={"Accept": accept}, timeout=patience
    )
    took = time.monotonic() - began
    well = answer.status_code == 200 and mark in answer.text and '"loaded"' in answer.text
    return f"{form}: {answer.status_code} in {took:.1f} s, {'loaded' if well else 'LOST'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=200)
    asked = parser.parse_args()
    simulator = Simulator()
    simulator.faults(load_ms=int(asked.seconds * 1000))
    with tempfile.TemporaryDirectory() as folder:
        gateway = Gateway(Path(folder), simulator.url, WEB_CONCURRENCY=1)
        nginx = Nginx(Path(folder) / "nginx", gateway.url)
        try:
            with ThreadPoolExecutor() as pool:
                told = list(pool.map(lambda form: load(nginx.url, form, asked.seconds + 60), FORMS))
        finally:
            nginx.stop()
            gateway.stop()
            simulator.stop()
    print(*told, sep="\n")
    return 1 if any("LOST" in line for line in told) else 0


if __name__ == "__main__":
    sys.exit(main())
