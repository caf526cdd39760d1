"""HTTP and SDK try every address of LM Studio's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import Patched
from tests.processes import Simulator

#: Replaces the resolver of a worker. Nothing listens on 127.0.0.2.
_RESOLVER = """import socket
    plain = socket.getaddrinfo
    def resolve(host, port, *rest, **options):
        if host != "lmstudio.example":
            return plain(host, port, *rest, **options)
        return [(2, 1, 6, "", (address, port)) for address in {addresses!r}]
    socket.getaddrinfo = resolve"""


@pytest.mark.parametrize("addresses", [["127.0.0.2", "127.0.0.1"], ["127.0.0.1", "127.0.0.2"]])
def test_http_and_sdk_try_every_address_of_the_name(
    tmp_path: Path, simulator: Simulator, addresses: list[str]
) -> None:
    url = f"http://lmstudio.example:{simulator.port}"
    resolver = _RESOLVER.format(addresses=addresses)
    gateway = Patched(tmp_path, url, inside=resolver, WEB_CONCURRENCY=1)
    try:
        assert gateway.get("/health").json()["status"] == "ok"
        assert gateway.get("/v1/models").status_code == 200
        assert gateway.get("/admin/models").status_code == 200
    finally:
        gateway.stop()
