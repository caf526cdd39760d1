"""The fuzzing campaign in a size for CI."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.campaign import Range, play

REQUESTS = 600


def test_no_input_breaks_the_gateway(tmp_path: Path) -> None:
    place = Range(tmp_path / "range")
    try:
        assert play(place, REQUESTS, seconds=150) > REQUESTS / 4
        # that some of them were served shows that not all was absurd
        assert place.statuses[200] > 20, place.statuses
        assert place.statuses[400] > 20, place.statuses
    finally:
        place.stop()
