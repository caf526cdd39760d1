"""Server-sent events on their way through: where events end, and which one carries the usage.

Patterns are searched in the bytes instead of parsing every event: inside a JSON string each quote
is escaped, so an unescaped ``"usage":`` can only be a member.
"""

from __future__ import annotations

import json
import re
from typing import Any

_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_USAGE = re.compile(rb'"usage"\s*:\s*(?=\{)')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_SOME_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\{')
_decoder = json.JSONDecoder()

#: An event that is larger than this is passed on without being looked at.
MAX_EVENT_BYTES = 1 << 20


class Tap:
    """Listens to a stream for its usage and, with ``remove``, takes the extra usage chunk out.

    :meth:`feed` gives what is to be sent on for each arrival: the same bytes, except that with
    ``remove`` the beginning of an event that might be the usage chunk waits for its end.
    """

    def __init__(self, *, remove: bool) -> None:
        self._remove = remove
        self._open = b""  # what has come of the event that has not ended
        self._sent = 0  # how much of it was sent on: all or nothing
        self._last_sent = b""
        self.tokens: dict[str, int] = {}

    @property
    def between_events(self) -> bool:
        """Whether the bytes sent so far end where an event ends."""
        return not self._last_sent or _last_end(self._last_sent) == len(self._last_sent)

    def feed(self, data: bytes) -> bytes:
        """Take an arrival; returns what goes to the client now (perhaps nothing)."""
        whole = self._open + data if self._open else data
        end = _last_end(whole)
        complete = whole if end == len(whole) else whole[:end]
        has_usage = _USAGE.search(complete) is not None
        if has_usage:
            self._note(complete)
        out = self._select(complete, whole[end:], has_usage) if self._remove else data
        self._open = whole[end:]
        if len(self._open) > MAX_EVENT_BYTES:
            self._open = self._open[-4:]
            self._sent = len(self._open)
        if out:
            self._last_sent = out[-4:] if len(out) >= 4 else (self._last_sent + out)[-4:]
        return out

    def rest(self) -> bytes:
        """What was still held back when the stream ended."""
        held = self._open[self._sent :] if self._remove else b""
        if _USAGE.search(self._open) is not None:
            self._note(self._open)
            if _NO_CHOICES.search(self._open):
                held = b""
        self._open = b""
        return held

    def _select(self, complete: bytes, rest: bytes, has_usage: bool) -> bytes:
        """In a stream with an unwanted usage chunk: what to send for this arrival."""
        out = b""
        if complete:
            # The first event may have been sent in part; then it is known to be no usage chunk
            # and stands, untouched, at the front of what is left.
            kept = _without_usage(complete) if has_usage else complete
            out = kept[self._sent :] if self._sent else kept
            self._sent = 0
        if rest and self._is_harmless(rest):
            out += rest[self._sent :]
            self._sent = len(rest)
        return out

    def _is_harmless(self, event: bytes) -> bool:
        return len(event) > MAX_EVENT_BYTES or _SOME_CHOICES.search(event) is not None

    def _note(self, events: bytes) -> None:
        for usage in usages(events):
            self.tokens.update(usage)


def usages(payload: bytes) -> list[dict[str, int]]:
    """Every usage object in a JSON or SSE payload, in the contract's names."""
    found = []
    for match in _USAGE.finditer(payload):
        try:
            usage, _ = _decoder.raw_decode(payload[match.end() :].decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            continue
        found.append(_tokens(usage))
    return found


def _tokens(usage: dict[str, Any]) -> dict[str, int]:
    """OpenAI's and Anthropic's names for the two counts."""
    names = {
        "prompt_tokens": "promptTokens",
        "input_tokens": "promptTokens",
        "completion_tokens": "completionTokens",
        "output_tokens": "completionTokens",
    }
    counts = {}
    for name, value in usage.items():
        if name in names and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            counts[names[name]] = value
    return counts


def _without_usage(events: bytes) -> bytes:
    """Complete events without those that carry nothing but usage."""
    kept = []
    start = 0
    for match in _EVENT_END.finditer(events):
        event = events[start : match.end()]
        start = match.end()
        if _USAGE.search(event) is None or _NO_CHOICES.search(event) is None:
            kept.append(event)
    kept.append(events[start:])
    return b"".join(kept)


def _last_end(data: bytes) -> int:
    """Where the last complete event of ``data`` ends; 0 when none does."""
    if data.endswith(b"\n\n"):
        return len(data)
    return max(_end_of_last(mark, data) for mark in (b"\n\n", b"\r\n\r\n", b"\r\r"))


def _end_of_last(mark: bytes, data: bytes) -> int:
    place = data.rfind(mark)
    return place + len(mark) if place >= 0 else 0
