"""The harness of the fault tests: a patched gateway, busy clients, streams and failing disks.

Nothing here imports gevent: the clients are threads.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Gateway, eventually

MODEL = "qwen2-1.5b-instruct"
CHAT = "/v1/chat/completions"
#: Sets constants in the worker, after gunicorn has forked it and gevent has patched it.
_SCRIPT = """
import resource
from gateway.serving import launch, worker
{before}
plain_run = worker.Worker.run
def run(self):
    import gateway.proxy.exchange
{inside}
    plain_run(self)
worker.Worker.run = run
launch.serve_gunicorn(launch.checked_settings_or_exit())
"""


@dataclass
class Row:
    """One row of the campaign's table. ``problems`` describes whatever must not happen but did."""

    fault: str
    lost: str
    recovery: str
    problems: list[str]


class Patched(Gateway):
    """A gateway with constants set by the test: ``before`` runs in the master, ``inside`` in each
    worker."""

    def __init__(
        self, folder: Path, lmstudio: str, before: str = "", inside: str = "pass", **settings: Any
    ) -> None:
        self.script = _SCRIPT.format(before=before, inside=f"    {inside}")
        super().__init__(folder, lmstudio, PYTHONPATH=Path(__file__).parents[2], **settings)

    def command(self) -> list[str]:
        return [sys.executable, "-c", self.script]


def chat(count: int, stream: bool, **more: Any) -> bytes:
    """The body of a chat request; the simulator responds by counting to ``count``."""
    messages = [{"role": "user", "content": f"count to {count}"}]
    return json.dumps({"model": MODEL, "messages": messages, "stream": stream, **more}).encode()


class BusyClients:
    """Clients that send one chat after another; every second one keeps its connection alive."""

    def __init__(self, port: int, clients: int) -> None:
        self.port, self.done = port, 0
        self.failures: list[str] = []
        self._body = chat(3, False)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)

    def _run(self, number: int) -> None:
        kept = None
        while not self._stop.is_set():
            connection = kept or http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            try:
                connection.request("POST", CHAT, self._body)
                response = connection.getresponse()
                text = response.read()
                self._record(response.status, "" if response.status == 200 else repr(text[:200]))
                kept = connection if number % 2 and not response.will_close else None
            except (OSError, http.client.HTTPException) as error:
                self._record(0, repr(error))
                kept = None
            if kept is None:
                connection.close()
        if kept is not None:
            kept.close()

    def _record(self, status: int, problem: str) -> None:
        with self._lock:
            self.done += 1
            if problem:
                self.failures.append(f"{status} {problem}")


class Stream:
    """A chat stream that is read in the background."""

    def __init__(self, port: int, count: int = 20, pace_ms: float = 50) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), 90)
        self.port: int = self.sock.getsockname()[1]
        body = chat(count, True)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nX-Simulator-Pace-Ms: {pace_ms}\r\n"
        self.sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.text = b""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    @property
    def started(self) -> bool:
        return b"data:" in self.text

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def complete(self) -> bool:
        """Whether the response arrived whole, up to its proper end."""
        return b"data: [DONE]" in self.text and self.text.endswith(b"0\r\n\r\n")

    @property
    def ended_with_error(self) -> bool:
        """Whether the response ended with an error event and without an end that looks complete."""
        ended = b"data: [DONE]" in self.text or self.text.endswith(b"0\r\n\r\n")
        return b'data: {"error":' in self.text and not ended

    def join(self, timeout: float = 90) -> None:
        self._thread.join(timeout)
        assert not self.running, "a stream never ends"
        self.sock.close()

    def _read(self) -> None:
        try:
            while not self.text.endswith(b"\r\n0\r\n\r\n"):
                data = self.sock.recv(65536)
                if not data:
                    return
                self.text += data
        except OSError:
            return


def start_streams(port: int, number: int, **options: Any) -> list[Stream]:
    """Open ``number`` streams and wait until each has started."""
    opened = [Stream(port, **options) for _ in range(number)]
    eventually(lambda: all(stream.started for stream in opened), 60)
    return opened


def ask(port: int, timeout: float = 60, method: str = "POST", path: str = CHAT, body: Any = None,
        headers: dict[str, str] | None = None) -> tuple[int, Any]:  # fmt: skip
    """Status and JSON of one request over its own connection; status 0 without a response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    content = json.dumps(body).encode() if body is not None else chat(2, False)
    try:
        given = {"Content-Type": "application/json", **(headers or {})}
        connection.request(method, path, content if method == "POST" else None, given)
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")
    except (OSError, http.client.HTTPException):
        return 0, None
    finally:
        connection.close()


def recovery(condition: Callable[[], Any], timeout: float = 60) -> str:
    """Wait for a condition and return how long it took, as the table shows it."""
    began = time.monotonic()
    eventually(condition, timeout)
    return f"{time.monotonic() - began:.1f} s"


def serves(port: int) -> bool:
    """Whether twenty chats in a row succeed, whichever workers serve them."""
    return all(ask(port, 10)[0] == 200 for _ in range(20))


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[str], None]]:
    """Mount a disk of 2 MiB at ``folder``; yields a function to call with ``full`` or ``repaired``.

    Only root can mount one: for other users the test is skipped.
    """
    folder.mkdir(parents=True)
    command = ("mount", "-t", "tmpfs", "-o", "size=2m", "small", str(folder))
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")
    ballast = folder / "ballast"

    def change(condition: str) -> None:
        if condition == "full":
            _fill(ballast)
        else:
            ballast.unlink()

    try:
        yield change
    finally:
        subprocess.run(("umount", "-l", str(folder)), check=True)


@contextmanager
def fragile_disk(folder: Path) -> Iterator[Callable[[str], None]]:
    """Mount ext4 at ``folder``; yields a function to call with ``readonly`` or ``repaired``.

    This is how the kernel makes a failing disk read-only. It can only be repaired while unused.
    Only root can mount one: for other users, and without loop devices, the test is skipped.
    """
    folder.mkdir(parents=True)
    image = folder.with_suffix(".ext4")
    with image.open("wb") as file:
        file.truncate(16 << 20)
    mount = ("mount", "-o", "loop", str(image), str(folder))
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    for command in (("mkfs.ext4", "-q", str(image)), mount):
        if not shutil.which(command[0], path=path):
            pytest.skip(f"{command[0]} is not installed")
        if subprocess.run(command, capture_output=True, env={"PATH": path}).returncode != 0:
            pytest.skip("mounting a disk needs root and loop devices")

    def change(condition: str) -> None:
        if condition == "readonly":
            subprocess.run(("mount", "-o", "remount,abort", str(folder)), check=True)
        else:
            subprocess.run(("umount", str(folder)), check=True)
            subprocess.run(mount, check=True)

    try:
        yield change
    finally:
        subprocess.run(("umount", "-l", str(folder)), check=True)


@contextmanager
def locked_database(database: Path) -> Iterator[Callable[[str], None]]:
    """Yields a function: ``locked`` locks the database as a writer, ``repaired`` unlocks it."""
    held: list[sqlite3.Connection] = []

    def change(condition: str) -> None:
        if condition == "locked":
            held.append(sqlite3.connect(database, timeout=30, isolation_level=None))
            held[0].execute("BEGIN EXCLUSIVE")
        else:
            held.pop().close()

    yield change
    while held:
        held.pop().close()


def tracebacks(gateway: Gateway, *ignored: str) -> list[str]:
    """The first tracebacks in the log, except those that contain one of the ignored texts."""
    found = re.findall(r"Traceback \(most recent call last\):\n(?:  .*\n)*.*", gateway.logged())
    return [one[-600:] for one in found if not any(word in one for word in ignored)][:3]


def _fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 1024, 1):
            try:
                while True:
                    file.write(size * b"x")
            except OSError:
                continue
