"""A network between the gateway and LM Studio that can go down without a word.

Neither a FIN nor a reset tells either side: as after a power loss, or with a cable pulled out. It
needs Linux, but no privileges.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import threading

#: From <asm-generic/socket.h>.
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
#: The BPF program "ret #0", which drops every packet before TCP sees it.
_DROP = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
_PROGRAM = struct.pack("HL", 1, ctypes.addressof(_DROP))


class Network:
    """Relays the connections to a port, until :meth:`cut`."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._lock = threading.Lock()
        self._open: list[tuple[socket.socket, socket.socket]] = []
        self._dead: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self) -> None:
        """Drop every packet of the connections, and those that would open new ones."""
        with self._lock:
            _drop_packets(self._listener)
            for near, _ in self._open:
                _drop_packets(near)
                self._dead.add(near)

    def restore(self) -> None:
        """Let new connections through; those that were cut stay dead."""
        self._listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(10)
        self._listener.close()
        for pair in self._open:
            for sock in pair:
                _shut(sock)
        for thread in self._threads[1:]:
            thread.join(10)
        for pair in self._open:
            for sock in pair:
                sock.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            with self._lock:
                self._open.append((near, far))
            for source, sink in ((near, far), (far, near)):
                pump = threading.Thread(target=self._pump, args=(near, source, sink))
                self._threads.append(pump)
                pump.start()

    def _pump(self, near: socket.socket, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if near not in self._dead:
                    sink.sendall(data)
        except OSError:
            pass
        if near not in self._dead:
            _shut(sink)


def _drop_packets(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _PROGRAM)


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
