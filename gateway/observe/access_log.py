"""The access log: one line per request.

A request only appends to a queue in memory; a greenlet of the worker formats and writes the lines,
so that a slow log delays no request.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import deque
from typing import Any

import gevent
from gevent.event import Event

from gateway.clock import timestamp
from gateway.observe.record import Record, milliseconds

#: Lines that wait to be written; beyond that the oldest are dropped.
MAX_LINES = 50_000
#: Seconds in which lines are collected for one write.
COLLECT_SECONDS = 0.05

_HARMLESS = re.compile(r"[\x21\x23-\x7e]+")


class AccessLog:
    """One line a request, in ``LOG_FORMAT``, at ``LOG_LEVEL`` info and below. No prompt, no key."""

    def __init__(self, level: str, form: str) -> None:
        self._enabled = level in ("info", "debug")
        self._detailed = level == "debug"
        self._json = form == "json"
        self._waiting: deque[Record | dict[str, Any]] = deque(maxlen=MAX_LINES)
        self._arrived = Event()
        self._writer: gevent.Greenlet | None = None

    def start(self) -> None:
        """Start writing; in the worker, after the fork."""
        if self._enabled and self._writer is None:
            self._writer = gevent.spawn(self._write_for_ever)

    def stop(self) -> None:
        """Write what still waits."""
        if self._writer is not None:
            self._writer.kill()
            self._writer = None
            sys.stderr.write(self._take())

    def exchange(self, record: Record) -> None:
        """An inference exchange has ended."""
        self._put(record)

    def request(self, entry: dict[str, Any]) -> None:
        """Any other request was answered; ``entry`` as in :meth:`_entry`, without a timestamp."""
        self._put({**entry, "timestamp": time.time()})

    def _put(self, entry: Record | dict[str, Any]) -> None:
        if self._enabled:
            self._waiting.append(entry)
            if not self._arrived.is_set():
                self._arrived.set()

    def _write_for_ever(self) -> None:
        while True:
            self._arrived.wait()
            gevent.sleep(COLLECT_SECONDS)
            self._arrived.clear()
            # in a real thread: whoever reads our stderr may be slow
            gevent.get_hub().threadpool.apply(_write, (self._take(),))

    def _take(self) -> str:
        lines = []
        while self._waiting:
            entry = self._waiting.popleft()
            lines.append(self._line(self._entry(entry) if isinstance(entry, Record) else entry))
        return "".join(lines)

    def _entry(self, record: Record) -> dict[str, Any]:
        began = record.started
        entry: dict[str, Any] = {
            "timestamp": time.time() - (time.monotonic() - record.ended),
            "requestId": record.request_id,
            "client": record.client,
            "method": record.method,
            "path": record.path,
            "status": record.status,
            "bytes": record.sent_bytes,
            "totalMs": milliseconds(record.ended - began),
            "modelAsked": record.asked_model,
            "model": record.model,
            "stream": record.stream,
            "queueMs": _after(began, record.upstream_sent),
            "ttftMs": record.ttft_ms,
            "promptTokens": record.tokens.get("promptTokens"),
            "completionTokens": record.tokens.get("completionTokens"),
            "cancelled": record.cancelled,
        }
        if record.error:
            entry["error"] = record.error
        if self._detailed:
            entry["sentToLmStudioMs"] = _after(began, record.upstream_sent)
            entry["headMs"] = _after(began, record.upstream_head)
            entry["firstByteMs"] = record.ttft_ms
            entry["endedMs"] = entry["totalMs"]
        return entry

    def _line(self, entry: dict[str, Any]) -> str:
        entry["timestamp"] = timestamp(entry["timestamp"])
        if self._json:
            named = {"level": "info", "logger": "gateway.access", **entry}
            return json.dumps(named) + "\n"
        fields = " ".join(
            f"{name}={_text(value)}"
            for name, value in entry.items()
            if name not in ("timestamp", "method", "path") and value not in (None, "")
        )
        where = f"{_text(entry['method'])} {_text(entry['path'])}"
        return f"{entry['timestamp']} info gateway.access: {where} {fields}\n"


def _after(began: float, moment: float | None) -> float | None:
    return None if moment is None else milliseconds(moment - began)


def _text(value: Any) -> str:
    """A value as it stands in a text line; what could forge fields or lines is quoted."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value if _HARMLESS.fullmatch(value) else json.dumps(value)
    return str(value)


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
