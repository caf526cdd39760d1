"""Fixtures of all tests: a simulator for each module, gateways as the tests ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Gateway, Simulator


@pytest.fixture(scope="module")
def shared_simulator() -> Iterator[Simulator]:
    simulator = Simulator(0, "--pace-ms", "1")
    yield simulator
    simulator.stop()


@pytest.fixture
def simulator(shared_simulator: Simulator) -> Simulator:
    """The module's simulator, with nothing loaded, no faults and no records."""
    shared_simulator.reset()
    return shared_simulator


@pytest.fixture(scope="module")
def shared_gateway(
    shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path_factory.mktemp("gateway"), shared_simulator.url)
    yield gateway
    gateway.stop()


@pytest.fixture
def gateway(shared_gateway: Gateway, simulator: Simulator) -> Gateway:
    """The module's gateway (two workers, no keys), with no active model."""
    assert shared_gateway.post("/admin/models/deactivate").status_code == 200
    return shared_gateway


@pytest.fixture
def launch(tmp_path: Path, simulator: Simulator) -> Iterator[Callable[..., Gateway]]:
    """Start gateways with settings of one's own; they end with the test."""
    started: list[Gateway] = []

    def start(lmstudio: str | None = None, **settings: Any) -> Gateway:
        folder = tmp_path / f"gateway-{len(started)}"
        started.append(Gateway(folder, lmstudio or simulator.url, **settings))
        return started[-1]

    yield start
    for gateway in started:
        gateway.stop()
