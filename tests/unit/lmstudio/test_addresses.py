"""Every address of LM Studio's name is tried, the one that worked last before the others."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from gateway.lmstudio.addresses import Addresses


@pytest.fixture(autouse=True)
def resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        assert (host, port) == ("both", 1234)
        tcp = (socket.SOCK_STREAM, 6, "")
        return [
            (socket.AF_INET6, *tcp, ("::1", port, 0, 0)),
            (socket.AF_INET, *tcp, ("127.0.0.1", port)),
            (socket.AF_INET, *tcp, ("127.0.0.1", port)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_the_addresses_come_in_the_order_of_the_resolver() -> None:
    assert Addresses("both", 1234).in_turn() == ["::1", "127.0.0.1"]


def test_the_address_that_worked_last_comes_first() -> None:
    addresses = Addresses("both", 1234)
    addresses.worked("127.0.0.1")
    assert addresses.in_turn() == ["127.0.0.1", "::1"]


@pytest.mark.parametrize("literal", ["192.0.2.1", "2001:db8::1"])
def test_an_ip_address_is_not_resolved(literal: str) -> None:
    assert Addresses(literal, 1234).in_turn() == [literal]
