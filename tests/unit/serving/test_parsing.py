"""The cache of parsed header lines holds neither credentials nor much memory."""

from __future__ import annotations

import pytest

from gateway.serving import parsing
from gateway.serving.parsing import header_field


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "_cache", {})


@pytest.mark.parametrize(
    "name",
    ["Authorization", "proxy-authorization", "X-API-Key", "cookie", "X-Forwarded-For", "forwarded"],
)
def test_a_line_with_a_credential_or_an_address_is_not_kept(name: str) -> None:
    key = "HTTP_" + name.upper().replace("-", "_")
    for _ in range(2):
        assert header_field(f"{name}: MARKER".encode()) == (key, "MARKER")
    assert not parsing._cache


def test_other_short_lines_are_kept() -> None:
    for _ in range(2):
        assert header_field(b"Accept: */*") == ("HTTP_ACCEPT", "*/*")
    assert list(parsing._cache) == [b"Accept: */*"]


def test_the_cache_is_bounded_in_lines_and_in_bytes() -> None:
    for number in range(10_000):
        assert header_field(b"X-A: %d" % number) == ("HTTP_X_A", str(number))
        header_field(b"X-B: %d" % number + b"b" * 1000)
    assert 0 < len(parsing._cache) <= 2048
    assert max(map(len, parsing._cache)) < 300
