"""The record of one inference exchange: filled while it is in flight, reported when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

#: Characters of a model's name and of a path that are kept: clients choose them.
MAX_NAME, MAX_PATH = 200, 500


@dataclass
class Record:
    """One exchange. Times are readings of :func:`time.monotonic`, in seconds."""

    request_id: str
    client: str
    method: str
    #: The path at LM Studio, ``/v1/…``.
    path: str
    #: The model that the client requested (empty: none) and the one sent upstream.
    requested_model: str = ""
    model: str = ""
    stream: bool = False
    #: Identifies this exchange among those of all workers.
    operation: str = ""
    on_finish: Callable[[Record], None] = lambda record: None
    started: float = field(default_factory=time.monotonic)
    upstream_sent: float | None = None
    upstream_head: float | None = None
    first_byte: float | None = None
    ended: float = 0.0
    status: int = 0
    sent_bytes: int = 0
    #: Number of stream events sent to the client; models send about one token in each.
    chunks: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.path = self.path[:MAX_PATH]

    def set_models(self, requested: str | None, sent: str) -> None:
        """Set the model that the client named (None: it named none) and the one sent upstream, of
        which only the beginning is kept."""
        self.requested_model, self.model = (requested or "")[:MAX_NAME], sent[:MAX_NAME]

    @property
    def failed(self) -> bool:
        return self.error is not None

    @property
    def counts_as_error(self) -> bool:
        """Whether the exchange failed or was rejected; a cancelled one is not an error."""
        return not self.cancelled and (self.failed or self.status >= 400)

    def sent(self, piece: bytes) -> None:
        """Count a piece of the response body that is about to be written to the client."""
        if self.first_byte is None and piece:
            self.first_byte = time.monotonic()
        self.sent_bytes += len(piece)
        if self.stream:
            self.chunks += piece.count(b"data:")

    def fail(self, reason: str) -> None:
        """Mark the exchange as failed. Only the first reason is kept; it is shown to operators."""
        if self.error is None:
            self.error = reason[:MAX_PATH]

    def finish(self, *, cancelled: bool = False) -> None:
        """End the exchange when its last byte is written or its client has disconnected.

        Only the first call counts.
        """
        if self.ended:
            return
        self.ended = time.monotonic()
        self.cancelled = cancelled
        if cancelled:
            self.status = 499  # nginx's "client closed request"
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
        """Milliseconds from the start to the first byte of the response body."""
        return None if self.first_byte is None else milliseconds(self.first_byte - self.started)

    @property
    def token_usage(self) -> dict[str, int | None]:
        prompt, completion = self.tokens.get("promptTokens"), self.tokens.get("completionTokens")
        total = None if not self.tokens else (prompt or 0) + (completion or 0)
        return {"promptTokens": prompt, "completionTokens": completion, "totalTokens": total}

    @property
    def tokens_per_second(self) -> float | None:
        """Completion tokens per second, measured from the first byte of a stream, otherwise from
        the start of the exchange."""
        completion = self.tokens.get("completionTokens")
        if not completion:
            return None
        since = self.first_byte if self.stream and self.first_byte else self.started
        return round(completion / max(self.ended - since, 0.001), 2)


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 1)
