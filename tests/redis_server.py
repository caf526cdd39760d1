"""A real redis-server without persistence, for the tests of the shared state."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import redis

from tests.nginx import require
from tests.processes import eventually, free_port

START_TIMEOUT = 20.0


class RedisServer:
    """redis-server on a free port, which it keeps when it is stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self._binary = require("redis-server")
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self._folder), "--logfile", "redis.log"]
        self.process = subprocess.Popen([*command, "--appendonly", "no", "--save", ""])
        eventually(self._responds, START_TIMEOUT)

    def stop(self) -> None:
        """Stop the server and lose its data."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(20)

    def freeze(self) -> None:
        """Make the server hang: it still accepts connections and bytes, but never responds."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def save_and_stop(self) -> None:
        """Save the data to disk and stop the server; :meth:`start` loads it again."""
        with redis.Redis(port=self.port) as client:
            client.save()
        self.stop()

    def _responds(self) -> bool:
        assert self.process.poll() is None, "redis-server did not start"
        with redis.Redis(port=self.port, socket_timeout=1) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False
