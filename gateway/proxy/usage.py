"""Finds token usage in responses, and removes the usage chunk that the client did not ask for.

The bytes are searched with patterns, which is cheaper than parsing every event. It is safe because
quotes inside a JSON string are escaped: an unescaped ``"usage":`` can only be a member.
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

#: Larger events are passed on unexamined.
MAX_EVENT_BYTES = 1 << 20


class Tap:
    """Reads the usage in an event stream and, with ``remove_usage``, removes the usage chunk.

    :meth:`feed` returns the bytes to send for each arrival. Without ``remove_usage`` they are those
    that arrived; with it, the beginning of an event that may be the usage chunk is held back until
    the event is complete.
    """

    def __init__(self, *, remove_usage: bool) -> None:
        self._remove_usage = remove_usage
        self._open = b""  # the event at the end that is not complete yet
        self._sent = 0  # how many bytes of it have been sent: all or none
        self._last_sent = b""
        self.tokens: dict[str, int] = {}

    @property
    def between_events(self) -> bool:
        """Whether the bytes sent so far end where an event ends."""
        return not self._last_sent or _last_end(self._last_sent) == len(self._last_sent)

    def feed(self, data: bytes) -> bytes:
        """Take an arrival; returns the bytes to send to the client now, perhaps none."""
        whole = self._open + data if self._open else data
        end = _last_end(whole)
        complete = whole if end == len(whole) else whole[:end]
        has_usage = _USAGE.search(complete) is not None
        if has_usage:
            self._count(complete)
        out = self._filter(complete, whole[end:], has_usage) if self._remove_usage else data
        self._open = whole[end:]
        if len(self._open) > MAX_EVENT_BYTES:
            self._open = self._open[-4:]
            self._sent = len(self._open)
        if out:
            self._last_sent = out[-4:] if len(out) >= 4 else (self._last_sent + out)[-4:]
        return out

    def flush(self) -> bytes:
        """Return the bytes that are still held back when the stream has ended."""
        held = self._open[self._sent :] if self._remove_usage else b""
        if _USAGE.search(self._open) is not None:
            self._count(self._open)
            if _NO_CHOICES.search(self._open):
                held = b""
        self._open = b""
        return held

    def _filter(self, complete: bytes, rest: bytes, has_usage: bool) -> bytes:
        """Return the bytes to send of the complete events and of the incomplete one after them,
        without the usage chunk."""
        out = b""
        if complete:
            # The first event may have been sent in part. Then it is known not to be the usage
            # chunk, and is still the first of those that are kept.
            kept = _without_usage(complete) if has_usage else complete
            out = kept[self._sent :] if self._sent else kept
            self._sent = 0
        if rest and self._is_not_usage(rest):
            out += rest[self._sent :]
            self._sent = len(rest)
        return out

    def _is_not_usage(self, event: bytes) -> bool:
        return len(event) > MAX_EVENT_BYTES or _SOME_CHOICES.search(event) is not None

    def _count(self, events: bytes) -> None:
        for usage in usages(events):
            self.tokens.update(usage)


def usages(payload: bytes) -> list[dict[str, int]]:
    """Return every usage object in a JSON or SSE payload, as ``promptTokens`` and
    ``completionTokens``."""
    found = []
    for match in _USAGE.finditer(payload):
        try:
            usage, _ = _decoder.raw_decode(payload[match.end() :].decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            continue
        found.append(_tokens(usage))
    return found


def _tokens(usage: dict[str, Any]) -> dict[str, int]:
    # OpenAI and Anthropic name the two counts differently
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
    """Remove the events that carry nothing but usage from a run of complete events."""
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
    """Return the offset at which the last complete event ends; 0 if there is none."""
    if data.endswith(b"\n\n"):
        return len(data)
    return max(_end_of_last(mark, data) for mark in (b"\n\n", b"\r\n\r\n", b"\r\r"))


def _end_of_last(mark: bytes, data: bytes) -> int:
    place = data.rfind(mark)
    return place + len(mark) if place >= 0 else 0
