"""What is known about one inference exchange while it runs, and told when it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Record:
    """One exchange. Times are of time.monotonic(), counts are bytes and tokens."""

    request_id: str
    client: str
    method: str
    path: str
    #: The model that the client asked for (empty: none) and the one that went upstream.
    asked_model: str
    model: str
    stream: bool
    on_finish: Callable[[Record], None]
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    first_byte: float | None = None
    ended: float = 0.0
    sent_bytes: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    cancelled: bool = False

    @property
    def failed(self) -> bool:
        return self.error is not None

    def sent(self, piece: bytes) -> None:
        """A piece of the answer's body is about to be written to the client."""
        if self.first_byte is None and piece:
            self.first_byte = time.monotonic()
        self.sent_bytes += len(piece)

    def fail(self, why: str) -> None:
        """The exchange did not end as it should; ``why`` is told to operators."""
        if self.error is None:
            self.error = why

    def finish(self, *, cancelled: bool = False) -> None:
        """The last byte has been written, or the client has left. Only the first call counts."""
        if self.ended:
            return
        self.ended = time.monotonic()
        self.cancelled = cancelled
        if cancelled:
            self.status = 499  # nginx's number for "client closed request"
        self.on_finish(self)
