"""Compares the proxy's throughput with 0 and with 20 readers of /debug/stream.

    python -m tests.soak.subscribers [--rounds 10] [--seconds 3] [--clients 16] [--readers 20]

Rounds of both kinds alternate, so that other load on the machine affects both alike. Exits with 1
when the throughput with readers is more than 10 % lower.
"""

from gevent import monkey

monkey.patch_all()

import argparse  # noqa: E402
import socket  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import gevent  # noqa: E402

from tests.processes import (  # noqa: E402
    Gateway,
    Simulator,
    default_signals_for_children,
    eventually,
)
from tests.raw_http import exchange, request  # noqa: E402
from tests.soak.traffic import CHAT, chat  # noqa: E402

#: The throughput with readers may be this much lower.
LIMIT = 0.10


def read_events(port: int) -> None:
    """Read and discard the event stream until killed."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(request("GET", "/debug/stream"))
        while client.recv(1 << 20):
            pass


def throughput(port: int, clients: int, seconds: float) -> float:
    """Chats per second with this many clients."""
    data = request("POST", CHAT, chat(5, stream=True), {"Pace-Ms": 0})
    deadline = time.monotonic() + seconds
    done = 0

    def work() -> None:
        nonlocal done
        while time.monotonic() < deadline:
            response = exchange(port, data)
            assert response.startswith(b"HTTP/1.1 200"), response[:200]
            done += 1

    started = time.monotonic()
    gevent.joinall([gevent.spawn(work) for _ in range(clients)], raise_error=True)
    return done / (time.monotonic() - started)


def with_readers(gateway: Gateway, count: int, clients: int, seconds: float) -> float:
    """The throughput while ``count`` readers read the event stream."""
    readers = [gevent.spawn(read_events, gateway.port) for _ in range(count)]

    def all_reading() -> bool:
        # an event lets the gateway notice that the readers of the last round have disconnected
        gateway.get("/v1/models")
        return f"event_subscribers {float(count)}\n" in gateway.get("/metrics").text

    eventually(all_reading)
    try:
        return throughput(gateway.port, clients, seconds)
    finally:
        gevent.killall(readers)


def main() -> int:
    default_signals_for_children()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--readers", type=int, default=20)
    parser.add_argument("--state", help="STATE_URL, if not SQLite")
    options = parser.parse_args()
    simulator = Simulator(0, "--pace-ms", "0")
    with tempfile.TemporaryDirectory() as folder:
        gateway = Gateway(Path(folder), simulator.url, STATE_URL=options.state, LOG_LEVEL="info")
        try:
            throughput(gateway.port, options.clients, 2)  # warm
            none, some = [], []
            for number in range(options.rounds):
                clients, seconds = options.clients, options.seconds
                none.append(with_readers(gateway, 0, clients, seconds))
                some.append(with_readers(gateway, options.readers, clients, seconds))
                print(f"{number + 1}: {none[-1]:.0f}/s and {some[-1]:.0f}/s", flush=True)
        finally:
            gateway.stop()
            simulator.stop()
    ratio = statistics.median(some) / statistics.median(none)
    print(f"0 readers {statistics.median(none):.0f}/s, {options.readers} readers", end=" ")
    print(f"{statistics.median(some):.0f}/s, ratio {ratio:.3f}")
    return 0 if ratio >= 1 - LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
