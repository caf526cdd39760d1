"""Bodies are read within the limits of size and of memory."""

from __future__ import annotations

import io
from typing import Any

import pytest

from gateway.errors import BadRequest, BodyTooLarge, Overloaded
from gateway.request import Budget, bodies


def environ(content: bytes, length: int | None = None) -> dict[str, Any]:
    """A request whose body is announced as ``length`` bytes, or is chunked without it."""
    announced = {} if length is None else {"CONTENT_LENGTH": str(length)}
    return {"wsgi.input": io.BytesIO(content), **announced}


@pytest.mark.parametrize("length", [100_000, None])
def test_a_body_takes_its_bytes_from_the_budget_until_it_is_released(length: int | None) -> None:
    budget = Budget(150_000)
    share = budget.share()
    assert bodies.read_body(environ(b"x" * 100_000, length), 1 << 20, share) == b"x" * 100_000
    assert budget.left == 50_000
    other = budget.share()
    with pytest.raises(Overloaded) as caught:
        bodies.read_body(environ(b"x" * 100_000, length), 1 << 20, other)
    assert ("Retry-After", "1") in caught.value.headers
    other.release()
    share.release()
    share.release()
    assert budget.left == 150_000
    bodies.read_body(environ(b"x" * 100_000, length), 1 << 20, other)


def test_a_body_that_can_not_fit_is_rejected_before_it_is_read() -> None:
    request = environ(b"x" * 100_000, 100_000)
    budget = Budget(99_999)
    with pytest.raises(Overloaded):
        bodies.read_body(request, 1 << 20, budget.share())
    assert (request["wsgi.input"].tell(), budget.left) == (0, 99_999)


def test_an_announcement_takes_nothing() -> None:
    budget = Budget(100_000)
    share = budget.share()
    with pytest.raises(BadRequest, match="incomplete"):
        bodies.read_body(environ(b"x", 100_000), 1 << 20, share)
    assert budget.left == 99_999


def test_the_limit_of_one_body_comes_first() -> None:
    with pytest.raises(BodyTooLarge):
        bodies.read_body(environ(b"x" * 20, 20), 10, Budget(5).share())
