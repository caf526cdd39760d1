"""Each fault of the campaign in a size for CI."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import clock_faults as clock
from tests.faults import outside_faults as outside
from tests.faults import process_faults as process
from tests.faults.stage import Row
from tests.processes import Simulator

FAULTS: dict[str, Callable[[Path, Simulator], Row]] = {
    "reload-loses-no-request": lambda folder, simulator: process.reload_under_load(
        folder, simulator, clients=16, requests=800
    ),
    "termination-lets-streams-finish-and-waits-for-nothing-else": lambda folder, simulator: (
        process.drain(folder, simulator, 8)
    ),
    "termination-tells-streams-beyond-the-grace-period": lambda folder, simulator: process.deadline(
        folder, simulator, 4
    ),
    "killed-worker-loses-only-its-own": lambda folder, simulator: process.worker_killed(
        folder, simulator, 8
    ),
    "lmstudio-killed-in-streams": lambda folder, _: outside.killed_in_streams(folder, 6),
    "lmstudio-killed-in-answers": lambda folder, _: outside.killed_in_answers(folder, 6),
    "lmstudio-killed-in-a-load": lambda folder, _: outside.killed_in_load(folder),
    "lmstudio-frozen": lambda folder, _: outside.frozen(folder),
    "redis-killed": outside.redis_killed,
    "disk-full": lambda folder, simulator: process.state(folder, simulator, "full"),
    "disk-readonly": lambda folder, simulator: process.state(folder, simulator, "readonly"),
    "state-locked": lambda folder, simulator: process.state(folder, simulator, "locked"),
    "clock-jumps": clock.jumps,
    "clock-jumps-with-redis": clock.jumps_with_redis,
    "descriptors-exhausted": process.descriptors_exhausted,
    "too-few-descriptors": process.upstream_descriptors_exhausted,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_gateway_survives(fault: str, tmp_path: Path, simulator: Simulator) -> None:
    row = FAULTS[fault](tmp_path / "fault", simulator)
    assert row.problems == [], row
