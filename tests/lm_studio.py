"""An LM Studio that follows a script, for tests of one exchange without a gateway."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import requests

from gateway.lmstudio.adapter import LMStudioAdapter
from gateway.lmstudio.exchange import Exchange

#: What a server does with one connection.
Script = Callable[[socket.socket], None]


class Server:
    """Serves each connection with the next script, the last one again and again."""

    def __init__(self, *scripts: Script) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.adapter = LMStudioAdapter(f"http://127.0.0.1:{self.port}")
        self.accepted = 0
        self._scripts = scripts
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def exchange(self, method: str = "GET", body: Any = None, **headers: str) -> Exchange:
        """An exchange that has not been sent."""
        request = requests.PreparedRequest()
        request.method, request.url, request.body = method, "/v1/models", body
        length = {"Content-Length": str(len(body))} if isinstance(body, bytes) else {}
        request.headers = {"Host": "lmstudio", **length, **headers}  # type: ignore[assignment]
        return Exchange(self.adapter, request)

    def stop(self) -> None:
        self.adapter.close()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            script = self._scripts[min(self.accepted, len(self._scripts) - 1)]
            self.accepted += 1
            self._threads.append(threading.Thread(target=self._run, args=(script, connection)))
            self._threads[-1].start()

    @staticmethod
    def _run(script: Script, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(30)
            try:
                script(connection)
            except OSError:
                return


@contextmanager
def served(*scripts: Script) -> Iterator[Server]:
    server = Server(*scripts)
    try:
        yield server
    finally:
        server.stop()


def read_head(connection: socket.socket) -> bytes:
    """Read a request up to the end of its head, and perhaps more; ``b""`` at the end."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = connection.recv(65536)
        if not piece:
            return b""
        received += piece
    return received


def answering(*responses: bytes) -> Script:
    """Answers the requests of a connection, which have no bodies, and then closes it."""

    def script(connection: socket.socket) -> None:
        for response in responses:
            if not read_head(connection):
                return
            connection.sendall(response)

    return script
