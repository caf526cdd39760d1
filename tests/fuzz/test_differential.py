"""A short comparison of the gateway's request parser with h11 and llhttp."""

from __future__ import annotations

import pytest

from tests.fuzz import differential
from tests.fuzz.differential import SEEDS, differences, run


def test_whatever_the_gateway_accepts_means_the_same_to_other_parsers() -> None:
    counts = run(seed=12, seconds=30, count=10_000)
    # not every request was absurd
    assert counts["accepted"] > counts["sent"] / 10, counts


@pytest.mark.parametrize("seed", SEEDS)
def test_the_requests_that_are_changed_are_valid(seed: bytes) -> None:
    assert differences(seed) == (True, [])


@pytest.mark.parametrize("changed", ["method", "target", "body"])
def test_a_difference_is_noticed(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = differential.ours

    def wrong(data: bytes) -> object:
        found = plain(data)
        assert found is not None
        setattr(found[0], changed, "another")
        return found

    monkeypatch.setattr(differential, "ours", wrong)
    _, problems = differences(SEEDS[4])
    assert len(problems) == 2
    assert all(f"another {changed}" in problem for problem in problems)
