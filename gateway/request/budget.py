"""Bounds the memory that request bodies take while they wait to be sent to LM Studio."""

from __future__ import annotations

from gateway.errors import Overloaded

#: Bytes of request bodies that a worker holds at a time.
MAX_HELD_BYTES = 256 * 1024 * 1024


class Budget:
    """The bytes of request bodies that one worker may hold."""

    def __init__(self, limit: int = MAX_HELD_BYTES) -> None:
        self.left = limit

    def share(self) -> Share:
        """Begin to account for one request's body."""
        return Share(self)


class Share:
    """What one request's body takes of a budget, until it is released."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._size = 0

    def check(self, size: int) -> None:
        """Raise Overloaded if ``size`` bytes are not left."""
        if size > self._budget.left:
            raise Overloaded("The gateway holds too many large requests; try again.")

    def take(self, size: int) -> None:
        """Take ``size`` more bytes; raises Overloaded if they are not left."""
        self.check(size)
        self._budget.left -= size
        self._size += size

    def release(self) -> None:
        """Give back everything that was taken. Further calls do nothing."""
        self._budget.left += self._size
        self._size = 0
