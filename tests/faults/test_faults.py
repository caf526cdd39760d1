"""Runs each fault of the campaign, scaled down if it takes long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import campaign
from tests.faults import client_faults as client
from tests.faults import dependency_faults as dependency
from tests.faults import process_faults as process
from tests.faults.harness import Row
from tests.processes import Simulator

FAULTS: dict[str, Callable[[Path, Simulator], Row]] = {
    **campaign.FAULTS,
    "reload": lambda folder, simulator: process.reload_under_load(
        folder, simulator, clients=16, requests=800
    ),
    "drain": lambda folder, simulator: process.drain(folder, simulator, 8),
    "deadline": lambda folder, simulator: process.deadline(folder, simulator, 4),
    "worker": lambda folder, simulator: process.worker_killed(folder, simulator, 8),
    "streams": lambda folder, _: dependency.killed_during_streams(folder, 6),
    "flood": lambda folder, simulator: client.flood_with_full_stderr(folder, simulator, 1200),
    "requests": lambda folder, _: dependency.killed_while_requests_wait(folder, 6),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_gateway_survives(fault: str, tmp_path: Path, simulator: Simulator) -> None:
    row = FAULTS[fault](tmp_path / "fault", simulator)
    assert row.problems == [], row
