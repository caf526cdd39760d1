"""Start the simulator: ``python -m gateway.simulator --port 0``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def run(
    host: str = "127.0.0.1",
    port: int = 1234,
    token: str | None = None,
    pace_ms: float = 20,
    tls_cert: str | None = None,
    tls_key: str | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; patches the process, so call it as the first thing there.

    Port 0 takes a free one. ``token`` (``sk-lm-AAAAAAAA:BBBBBBBBBBBBBBBBBBBB``) makes every caller
    show it, ``pace_ms`` is the time between two tokens. A line with the address goes to stdout
    once connections are accepted.
    """
    from gevent import monkey

    monkey.patch_all()
    # Only now: these modules take locks, sockets and sleeps from the patched library.
    from gateway.simulator.server import serve
    from gateway.simulator.state import Simulator

    serve(Simulator(token=token, pace_ms=pace_ms), host, port, tls_cert, tls_key)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` by default); return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gateway.simulator", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=1234, help="0 takes a free one")
    parser.add_argument(
        "--token", help="sk-lm-AAAAAAAA:BBBBBBBBBBBBBBBBBBBB, required from callers"
    )
    parser.add_argument("--pace-ms", type=float, default=20, help="time between two tokens")
    parser.add_argument("--tls-cert", help="PEM certificate; serves https and wss")
    parser.add_argument("--tls-key", help="PEM key of that certificate")
    arguments = parser.parse_args(argv)
    run(**vars(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
