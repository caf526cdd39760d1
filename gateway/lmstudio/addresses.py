"""The addresses of LM Studio's host name."""

from __future__ import annotations

import ipaddress
import socket


class Addresses:
    """The IP addresses of a host, the one that worked last before the others.

    ``localhost`` often means ::1 and 127.0.0.1, while LM Studio listens on one of them only.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._last = ""

    def in_turn(self) -> list[str]:
        """Return each address, in the order of ``getaddrinfo`` after the one that worked last.

        Raises OSError if the name can't be resolved.
        """
        try:
            return [str(ipaddress.ip_address(self._host))]
        except ValueError:
            pass
        found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        return sorted(addresses, key=lambda address: address != self._last)

    def worked(self, address: str) -> None:
        """Remember an address that could be connected to."""
        self._last = address
