"""An upstream whose streams have a pace, for measurements in milliseconds.

``X-Bench: paced COUNT INTERVAL_MS PREFILL_MS`` asks for COUNT events after PREFILL_MS.
``GET /disconnects`` lists when clients disconnected before the end of their stream, since the last
such request (``time.monotonic_ns()``, one clock for all processes of a machine).
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import json  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import gevent  # noqa: E402
from gevent.server import StreamServer  # noqa: E402

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nConnection: close\r\n\r\n"
disconnects: list[int] = []


def serve(client: socket.socket, address: object) -> None:
    head = b""
    while b"\r\n\r\n" not in head:
        data = client.recv(65536)
        if not data:
            return
        head += data
    if head.startswith(b"GET /disconnects"):
        client.sendall(_HEAD % b"application/json" + json.dumps(disconnects).encode())
        disconnects.clear()
        return
    bench = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"x-bench:"))
    count, pace, prefill = (int(number) for number in bench.split()[2:5])
    watcher = gevent.spawn(_watch, client)
    try:
        gevent.sleep(prefill / 1000)
        client.sendall(_HEAD % b"text/event-stream")
        for number in range(count):
            client.sendall(b'data: {"sent":%d}\n\n' % number)
            gevent.sleep(pace / 1000)
        client.sendall(b"data: [DONE]\n\n")
    except OSError:
        pass
    finally:
        watcher.kill()


def _watch(client: socket.socket) -> None:
    """Record the time at which the client disconnects."""
    while True:
        try:
            if client.recv(65536):
                continue
        except OSError:
            pass
        disconnects.append(time.monotonic_ns())
        client.close()
        return


if __name__ == "__main__":
    StreamServer(("127.0.0.1", int(sys.argv[1])), serve, backlog=2048).serve_forever()
