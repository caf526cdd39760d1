"""A short fuzzing campaign."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.campaign import Target, run

REQUESTS = 600


def test_no_input_breaks_the_gateway(tmp_path: Path) -> None:
    target = Target(tmp_path / "target")
    try:
        assert run(target, REQUESTS, seconds=150) > REQUESTS / 4
        # not every request was absurd, and not every one valid
        assert target.statuses[200] > 20, target.statuses
        assert target.statuses[400] > 20, target.statuses
    finally:
        target.stop()
