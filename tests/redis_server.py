"""A real redis-server that keeps nothing on disk, for the tests of the shared state."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import redis

from tests.nginx import require
from tests.processes import eventually, free_port

START_TIMEOUT = 20.0


class RedisServer:
    """redis-server on a free port; :meth:`start` after :meth:`stop` gives an empty one there."""

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
        eventually(self._answers, START_TIMEOUT)

    def stop(self) -> None:
        """End it; what it held is lost, unless it was saved."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(20)

    def freeze(self) -> None:
        """It takes connections and bytes, and answers nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def save_and_stop(self) -> None:
        """End it; :meth:`start` gives one that holds the same."""
        with redis.Redis(port=self.port) as client:
            client.save()
        self.stop()

    def _answers(self) -> bool:
        assert self.process.poll() is None, "redis-server did not start"
        with redis.Redis(port=self.port, socket_timeout=1) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False
