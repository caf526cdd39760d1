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
_USAGE_TEXT = re.compile(r'"usage"\s*:\s*(?=\{)')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_SOME_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\{')
_decoder = json.JSONDecoder()

#: Larger events are passed on unexamined.
MAX_EVENT_BYTES = 1 << 20
#: Up to this size an incomplete event is searched at each arrival.
_SMALL_EVENT = 4096
#: Malformed usage objects in a payload after which the search ends: each may be scanned to the end.
_MAX_MALFORMED = 8


class Tap:
    """Reads the usage in an event stream and, with ``remove_usage``, removes the usage chunk.

    :meth:`feed` returns the bytes to send for each arrival. Without ``remove_usage`` they are those
    that arrived; with it, the beginning of an event that may be the usage chunk is held back until
    the event is complete.
    """

    def __init__(self, *, remove_usage: bool) -> None:
        self._remove_usage = remove_usage
        self._open = bytearray()  # the event at the end that is not complete yet
        self._sent = 0  # how many bytes of it have been sent: all or none
        self._searched = 0  # how many bytes of it there were when it was last searched
        self._last_sent = b""
        self.tokens: dict[str, int] = {}

    @property
    def between_events(self) -> bool:
        """Whether the bytes sent so far end where an event ends."""
        return not self._last_sent or _last_end(self._last_sent) == len(self._last_sent)

    def feed(self, data: bytes) -> bytes:
        """Take an arrival; returns the bytes to send to the client now, perhaps none."""
        end = self._end_in(data)
        out = self._complete(data if end == len(data) else data[:end]) if end else b""
        if end < len(data):
            self._open += data if not end else data[end:]
            if self._remove_usage:
                out += self._beginning()
            if len(self._open) > MAX_EVENT_BYTES:
                self._open = self._open[-4:]
                self._sent = self._searched = len(self._open)
        if not self._remove_usage:
            out = data
        if out:
            self._last_sent = out[-4:] if len(out) >= 4 else (self._last_sent + out)[-4:]
        return out

    def flush(self) -> bytes:
        """Return the bytes that are still held back when the stream has ended."""
        event = bytes(self._open)
        held = event[self._sent :] if self._remove_usage else b""
        self._open.clear()
        return b"" if self._is_usage_chunk(event) else held

    def _end_in(self, data: bytes) -> int:
        """Return the offset in an arrival at which the last complete event ends; 0 if none does."""
        if not self._open:
            return _last_end(data)
        # the mark between two events may have begun in earlier arrivals
        before = bytes(self._open[-3:])
        return max(0, _last_end(before + data) - len(before))

    def _complete(self, data: bytes) -> bytes:
        """Take the end of the open event, and further complete ones; returns what to send of
        them."""
        events = bytes(self._open) + data if self._open else data
        sent, self._sent, self._searched = self._sent, 0, 0
        self._open.clear()
        # The first event may have been sent in part. Then it is known not to be the usage
        # chunk, and is still the first of those that are kept.
        kept = self._without_usage(events) if _USAGE.search(events) else events
        return kept[sent:] if sent else kept

    def _without_usage(self, events: bytes) -> bytes:
        """Count the tokens in a run of complete events; returns it without the usage chunk."""
        kept = []
        start = 0
        for match in _EVENT_END.finditer(events):
            event = events[start : match.end()]
            start = match.end()
            if not self._is_usage_chunk(event):
                kept.append(event)
        kept.append(events[start:])
        return b"".join(kept)

    def _is_usage_chunk(self, event: bytes) -> bool:
        """Count the tokens in a complete event; returns whether it carries nothing but usage."""
        if _USAGE.search(event) is None:
            return False
        for usage in usages(event):
            self.tokens.update(usage)
        return _NO_CHOICES.search(event) is not None

    def _beginning(self) -> bytes:
        """Return what to send of the open event: what is not sent yet, once the event is known not
        to be the usage chunk."""
        size = len(self._open)
        # a large event is not searched at each arrival, but each time that it has doubled
        if not self._sent and (size <= _SMALL_EVENT or size >= 2 * self._searched):
            self._searched = size
            if _SOME_CHOICES.search(self._open) is None and size <= MAX_EVENT_BYTES:
                return b""
        elif not self._sent and size <= MAX_EVENT_BYTES:
            return b""
        rest = bytes(self._open[self._sent :])
        self._sent = size
        return rest


def usages(payload: bytes) -> list[dict[str, int]]:
    """Return every usage object in a JSON or SSE payload, as ``promptTokens`` and
    ``completionTokens``."""
    text = payload.decode("utf-8", "replace")
    found = []
    position = malformed = 0
    while malformed < _MAX_MALFORMED and (match := _USAGE_TEXT.search(text, position)):
        position = match.end()
        try:
            usage, position = _decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            malformed += 1
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


def _last_end(data: bytes) -> int:
    """Return the offset at which the last complete event ends; 0 if there is none."""
    if data.endswith(b"\n\n"):
        return len(data)
    return max(_end_of_last(mark, data) for mark in (b"\n\n", b"\r\n\r\n", b"\r\r"))


def _end_of_last(mark: bytes, data: bytes) -> int:
    place = data.rfind(mark)
    return place + len(mark) if place >= 0 else 0
