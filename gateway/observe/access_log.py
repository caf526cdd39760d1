"""The access log: one line per request.

A request only appends to a queue in memory; one greenlet per worker formats and writes the lines,
so a slow log never delays a request.
"""

from __future__ import annotations

import json
import re
import time
from collections import deque
from typing import Any

import gevent
from gevent.event import Event

from gateway.clock import timestamp
from gateway.logs import stderr
from gateway.observe.record import MAX_PATH, Record, milliseconds

#: Lines queued for writing; beyond that the oldest are dropped. No text in a line is longer than
#: MAX_PATH.
MAX_LINES = 10_000
#: Seconds for which lines are collected before they are written together.
COLLECT_SECONDS = 0.05

#: Visible ASCII without the double quote.
_NEEDS_NO_QUOTES = re.compile(r"[\x21\x23-\x7e]+")


class AccessLog:
    """Logs each request when ``LOG_LEVEL`` is ``info`` or ``debug``. No line has a prompt or key.

    :param level: the value of ``LOG_LEVEL``; ``debug`` adds the times of each step.
    :param form: the value of ``LOG_FORMAT``, ``text`` or ``json``.
    """

    def __init__(self, level: str, form: str) -> None:
        self.configure(level)
        self._json = form == "json"
        self._queue: deque[Record | dict[str, Any]] = deque(maxlen=MAX_LINES)
        self._wakeup = Event()
        self._writer: gevent.Greenlet | None = None

    def configure(self, level: str) -> None:
        """Take another ``LOG_LEVEL``."""
        self._enabled = level in ("info", "debug")
        self._detailed = level == "debug"

    def start(self) -> None:
        """Start the writer; called in the worker, after the fork."""
        if self._writer is None:
            self._writer = gevent.spawn(self._run_writer)

    def stop(self) -> None:
        """Stop the writer and write the rest of the queue."""
        if self._writer is not None:
            self._writer.kill()
            self._writer = None
            stderr.write(self._take())

    def log_exchange(self, record: Record) -> None:
        """Log an inference exchange that has ended."""
        self._put(record)

    def log_request(self, entry: dict[str, Any]) -> None:
        """Log any other request; ``entry`` has fields of :meth:`_entry`, without a timestamp."""
        path = entry["path"][:MAX_PATH]
        self._put({**entry, "path": path, "timestamp": time.time()})

    def _put(self, entry: Record | dict[str, Any]) -> None:
        if self._enabled:
            self._queue.append(entry)
            if not self._wakeup.is_set():
                self._wakeup.set()

    def _run_writer(self) -> None:
        while True:
            self._wakeup.wait()
            gevent.sleep(COLLECT_SECONDS)
            self._wakeup.clear()
            stderr.write(self._take())

    def _take(self) -> str:
        """All queued entries as text, one line each."""
        lines = []
        while self._queue:
            entry = self._queue.popleft()
            lines.append(self._line(self._entry(entry) if isinstance(entry, Record) else entry))
        return "".join(lines)

    def _entry(self, record: Record) -> dict[str, Any]:
        """The fields of an exchange's line, as README.rst documents them."""
        started = record.started
        entry: dict[str, Any] = {
            "timestamp": time.time() - (time.monotonic() - record.ended),
            "requestId": record.request_id,
            "client": record.client,
            "method": record.method,
            "path": record.path,
            "status": record.status,
            "bytes": record.sent_bytes,
            "totalMs": milliseconds(record.ended - started),
            "modelAsked": record.requested_model,
            "model": record.model,
            "stream": record.stream,
            "queueMs": _elapsed_ms(started, record.upstream_sent),
            "ttftMs": record.ttft_ms,
            "promptTokens": record.tokens.get("promptTokens"),
            "completionTokens": record.tokens.get("completionTokens"),
            "cancelled": record.cancelled,
        }
        if record.error:
            entry["error"] = record.error
        if self._detailed:
            entry["sentToLmStudioMs"] = _elapsed_ms(started, record.upstream_sent)
            entry["headMs"] = _elapsed_ms(started, record.upstream_head)
            entry["firstByteMs"] = record.ttft_ms
            entry["endedMs"] = entry["totalMs"]
        return entry

    def _line(self, entry: dict[str, Any]) -> str:
        entry["timestamp"] = timestamp(entry["timestamp"])
        if self._json:
            return json.dumps({"level": "info", "logger": "gateway.access", **entry}) + "\n"
        fields = " ".join(
            f"{name}={_text(value)}"
            for name, value in entry.items()
            if name not in ("timestamp", "method", "path") and value not in (None, "")
        )
        target = f"{_text(entry['method'])} {_text(entry['path'])}"
        return f"{entry['timestamp']} info gateway.access: {target} {fields}\n"


def _elapsed_ms(started: float, moment: float | None) -> float | None:
    return None if moment is None else milliseconds(moment - started)


def _text(value: Any) -> str:
    """Format a value for a text line, quoting any string that could forge a field or a line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value if _NEEDS_NO_QUOTES.fullmatch(value) else json.dumps(value)
    return str(value)
