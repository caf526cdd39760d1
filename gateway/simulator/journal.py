"""The record of HTTP exchanges that tests read from ``GET /_simulator/requests``."""

from __future__ import annotations

import time
from base64 import b64encode
from collections import deque
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count

from gateway.simulator.catalogue import JsonObject

#: Bodies beyond this many bytes are kept as length and digest only; answers are cut there.
BODY_LIMIT = 1 << 20
#: All kept bytes together; beyond it the oldest records lose theirs, never the newest.
TOTAL_LIMIT = 128 << 20
RECORD_LIMIT = 5000


@dataclass
class Record:
    """One exchange. ``target`` and ``headers`` are as on the wire, times are epoch ms."""

    id: int
    method: str
    target: str
    headers: list[tuple[str, str]]
    started: float = field(default_factory=time.time)
    ended: float | None = None
    outcome: str = "running"
    status: int | None = None
    body: bytes = b""
    body_length: int = 0
    body_digest: str = ""
    sent_headers: list[tuple[str, str]] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)
    sent_length: int = 0

    def keep_body(self, body: bytes) -> None:
        """Note the request's body."""
        self.body_length, self.body_digest = len(body), sha256(body).hexdigest()
        self.body = body if len(body) <= BODY_LIMIT else b""

    def keep_sent(self, payload: bytes) -> None:
        """Note body bytes of the answer; cheap, as it happens for every token."""
        if (room := BODY_LIMIT - self.sent_length) > 0:
            self.sent.append(payload if len(payload) <= room else payload[:room])
        self.sent_length += len(payload)

    def end(self, outcome: str) -> None:
        """Close the record with ``complete``, ``client_gone`` or ``fault``."""
        self.ended, self.outcome = time.time(), outcome

    def as_json(self) -> JsonObject:
        """Return the form that the control path gives out."""
        return {
            "id": self.id,
            "method": self.method,
            "target": self.target,
            "headers": self.headers,
            "body": b64encode(self.body).decode(),
            "bodyLength": self.body_length,
            "bodySha256": self.body_digest,
            "startedMs": self.started * 1000,
            "endedMs": None if self.ended is None else self.ended * 1000,
            "outcome": self.outcome,
            "status": self.status,
            "sent": b64encode(b"".join(self.sent)).decode(),
            "sentHeaders": self.sent_headers,
        }


class Journal:
    """The newest records, bounded in number and in bytes."""

    def __init__(self) -> None:
        self._ids = count(1)
        self._bytes = 0
        self.records: deque[Record] = deque(maxlen=RECORD_LIMIT)

    def open(self, method: str, target: str, headers: list[tuple[str, str]]) -> Record:
        """Begin the record of an exchange."""
        record = Record(next(self._ids), method, target, headers)
        self.records.append(record)
        return record

    def close(self, record: Record, outcome: str) -> None:
        """End a record, and let the oldest ones go when too many bytes are kept."""
        record.end(outcome)
        self._bytes += len(record.body) + min(record.sent_length, BODY_LIMIT)
        if self._bytes > TOTAL_LIMIT:
            self._lighten()

    def since(self, record_id: int) -> list[JsonObject]:
        """Return the records with a higher id, oldest first."""
        return [record.as_json() for record in self.records if record.id > record_id]

    def clear(self) -> None:
        """Forget the records; ids go on."""
        self.records.clear()
        self._bytes = 0

    def _lighten(self) -> None:
        """Drop the bytes of the older half of the finished records."""
        finished = [record for record in self.records if record.ended is not None]
        for record in finished[: len(finished) // 2]:
            record.body, record.sent = b"", []
        kept = finished[len(finished) // 2 :]
        self._bytes = sum(len(one.body) + min(one.sent_length, BODY_LIMIT) for one in kept)
