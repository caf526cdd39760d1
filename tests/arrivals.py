"""Splits a stream of bytes into arrivals, for tests that must not depend on where it is split."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import strategies as st

#: Where to split; each number counts modulo the length of the bytes.
CUTS = st.lists(st.integers(0, 100_000), max_size=40)


def arrivals(data: bytes, cuts: list[int]) -> list[bytes]:
    """Split ``data`` into pieces that are not empty."""
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(edges)]
