"""What is known about one inference exchange while it runs, and told when it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Record:
    """One exchange. Times are of time.monotonic(), counts are bytes and tokens."""

    request_id: str
    client: str
    method: str
    #: LM Studio's path, ``/v1/…``.
    path: str
    #: The model that the client asked for (empty: none) and the one that went upstream.
    asked_model: str = ""
    model: str = ""
    stream: bool = False
    #: Names this exchange among all that run anywhere.
    operation: str = ""
    on_finish: Callable[[Record], None] = lambda record: None
    started: float = field(default_factory=time.monotonic)
    upstream_sent: float | None = None
    upstream_head: float | None = None
    first_byte: float | None = None
    ended: float = 0.0
    status: int = 0
    sent_bytes: int = 0
    #: Events of a stream that were sent; models stream about a token in each.
    chunks: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    cancelled: bool = False

    @property
    def failed(self) -> bool:
        return self.error is not None

    @property
    def counts_as_error(self) -> bool:
        """Failed or refused; a client that left is no error."""
        return not self.cancelled and (self.failed or self.status >= 400)

    def sent(self, piece: bytes) -> None:
        """A piece of the answer's body is about to be written to the client."""
        if self.first_byte is None and piece:
            self.first_byte = time.monotonic()
        self.sent_bytes += len(piece)
        if self.stream:
            self.chunks += piece.count(b"data:")

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

    def start_event(self) -> dict[str, Any]:
        """The data of ``inference_start``."""
        return {
            "requestId": self.request_id,
            "method": self.method,
            "path": self.path,
            "model": self.model,
            "stream": self.stream,
            "client": self.client,
        }

    def complete_event(self) -> dict[str, Any]:
        """The data of ``inference_complete``."""
        return {
            "requestId": self.request_id,
            "status": self.status,
            "totalTimeMs": milliseconds(self.ended - self.started),
            "ttftMs": self.ttft_ms,
            "tokenUsage": self.token_usage,
            "tokensPerSec": self.tokens_per_second,
            "cancelled": self.cancelled,
        }

    @property
    def ttft_ms(self) -> float | None:
        """Milliseconds to the first byte of the answer's body."""
        return None if self.first_byte is None else milliseconds(self.first_byte - self.started)

    @property
    def token_usage(self) -> dict[str, int | None]:
        prompt, completion = self.tokens.get("promptTokens"), self.tokens.get("completionTokens")
        total = None if not self.tokens else (prompt or 0) + (completion or 0)
        return {"promptTokens": prompt, "completionTokens": completion, "totalTokens": total}

    @property
    def tokens_per_second(self) -> float | None:
        """Completion tokens per second: of a stream from its first byte on, else of the whole."""
        completion = self.tokens.get("completionTokens")
        if not completion:
            return None
        begin = self.first_byte if self.stream and self.first_byte else self.started
        return round(completion / max(self.ended - begin, 0.001), 2)


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 1)
