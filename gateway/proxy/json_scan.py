"""Finds the members of a large JSON object without building a single value.

The C scanner of :mod:`json` builds everything that it reads: 20 to 30 times the bytes of a body of
small fields, in one call during which no other greenlet runs. This scanner checks the same grammar
(RFC 8259) on the bytes themselves, a window at a time, and lets other greenlets run in between.

Patterns do the work wherever nesting is shallow; what they can't match, because it is nested more
deeply or reaches beyond the window, is scanned token by token. Every quantifier is possessive: no
pattern ever backtracks.
"""

from __future__ import annotations

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Callable
from typing import NamedTuple

#: Members of the outermost object, at most.
MAX_MEMBERS = 1000
#: Nested arrays and objects, at most.
MAX_DEPTH = 500
#: Bytes scanned in one call. No number may be longer.
WINDOW = 32768
#: Longer names are checked but not reported. Every name that matters is shorter, even if each of
#: its characters is escaped.
MAX_NAME_BYTES = 512

#: What scanning one token costs, in bytes that the patterns scan in the same time.
_TOKEN_COST = 16
#: Levels of nesting that the patterns match.
_LEVELS = 3

_BLANKS = r"[ \t\n\r]*+"
_INSIDE = r'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4}))*+'
_STRING = f'"{_INSIDE}"'
_WORD = r"(?:-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][-+]?+[0-9]++)?+|true|false|null)"
_NAME = f"{_STRING}{_BLANKS}:{_BLANKS}"


def _value_pattern(levels: int) -> str:
    """A pattern for any value with at most ``levels`` levels of nesting."""
    if not levels:
        return f"(?:{_STRING}|{_WORD})"
    item = f"{_value_pattern(levels - 1)}{_BLANKS}"
    array = rf"\[{_BLANKS}(?:{item}(?:,{_BLANKS}(?!\])|(?=\])))*+\]"
    members = rf"\{{{_BLANKS}(?:{_NAME}{item}(?:,{_BLANKS}(?!\}})|(?=\}})))*+\}}"
    return f"(?:{_STRING}|{_WORD}|{array}|{members})"


_Match = Callable[[bytes, int, int], re.Match[bytes] | None]


def _compile(pattern: str) -> _Match:
    return re.compile(pattern.encode()).match


_match_blanks = _compile(_BLANKS)
_match_inside = _compile(_INSIDE)
_match_word = _compile(_WORD)
#: Runs of items, and of members, each with the comma behind it.
_match_items = _compile(f"(?:{_value_pattern(_LEVELS)}{_BLANKS},{_BLANKS})*+")
_match_members = _compile(f"(?:{_NAME}{_value_pattern(_LEVELS)}{_BLANKS},{_BLANKS})*+")

#: Runs of beginnings, each ``[``, or ``{`` with a name; a ``{`` without one may be the last.
_match_openings = _compile(rf"(?:(?:\[|\{{{_BLANKS}{_NAME}){_BLANKS})*+(?:\{{{_BLANKS}(?=\}}))?+")
_match_ends = _compile(rf"(?:[\]}}]{_BLANKS})*+")
_not_brackets = re.compile(rf"{_STRING}|[ \t\n\r:]++".encode()).sub
_TO_ENDS = bytes.maketrans(b"{[", b"}]")
_BLANK = b" \t\n\r"
_OPENINGS = (b"[", b"{")

_QUOTE, _COMMA, _COLON = b'",:'
_OBJECT, _OBJECT_END, _ARRAY, _ARRAY_END = b"{}[]"
_ENDS = (_OBJECT_END, _ARRAY_END)


class Found(NamedTuple):
    """The members of a body."""

    #: Offset of the object's opening brace.
    opening: int
    #: Name → start and end of its value, in bytes; of duplicates, those of the last one.
    spans: dict[str, tuple[int, int]]
    #: Whether the object has no members at all, not even ones with names that are too long.
    empty: bool


def scan(body: bytes, pause: Callable[[], None], window: int = WINDOW) -> Found:
    """Find the members of a JSON object in UTF-8.

    ``pause`` is called after a window or a few thousand tokens, a few milliseconds apart. Raises
    UnicodeDecodeError, or ValueError with the fault in words, for anything but a JSON object within
    the limits of this module.
    """
    _check_encoding(body, pause, window)
    return _Scanner(body, pause, window).scan()


def beginning(body: bytes, start: int) -> str:
    """Return about the first thousand characters of a string in a scanned body; empty if the value
    at ``start`` is not a string."""
    if body[start] != _QUOTE:
        return ""
    inside = _match_inside(body, start + 1, start + 1024)[0]  # type: ignore[index]
    # the slice may end inside a character
    text: str = json.loads(f'"{inside.decode("utf-8", "ignore")}"')
    return text


def check_depth(text: str) -> None:
    """Raise ValueError for a small valid JSON text that is nested too deeply.

    The C scanner has a limit as well, which depends on the stack and on the version of Python.
    """
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for bracket in re.findall(rf"[\[\]{{}}]|{_STRING}", text):
        if bracket in "[{":
            depth += 1
            if depth > MAX_DEPTH + 1:  # the outermost object does not count
                raise too_deep()
        elif bracket in "]}":
            depth -= 1


def too_deep() -> ValueError:
    """The error for a value with more than MAX_DEPTH levels of nesting."""
    return ValueError("nested too deeply")


def too_many() -> ValueError:
    """The error for an object with more than MAX_MEMBERS members."""
    return ValueError(f"more than {MAX_MEMBERS:,} top-level fields")


def _check_encoding(body: bytes, pause: Callable[[], None], window: int) -> None:
    decoder = getincrementaldecoder("utf-8")()
    for start in range(0, len(body), window):
        decoder.decode(body[start : start + window], start + window >= len(body))
        pause()


def _push(stack: bytearray, ends: bytes) -> None:
    stack += ends
    if len(stack) > MAX_DEPTH:
        raise too_deep()


class _Scanner:
    """One pass over a body. Methods named after a token return the offset behind it."""

    def __init__(self, body: bytes, pause: Callable[[], None], window: int) -> None:
        self._body = body
        self._pause = pause
        self._window = window
        self._budget = window

    def scan(self) -> Found:
        opening = self._blanks(0)
        position = self._blanks(self._expect(_OBJECT, opening))
        spans: dict[str, tuple[int, int]] = {}
        if self._at(position) == _OBJECT_END:
            self._expect_end(position + 1)
            return Found(opening, spans, empty=True)
        for _ in range(MAX_MEMBERS):
            after_name = self._string(position)
            start = self._after_colon(after_name)
            end = self._value(start)
            if after_name - position <= MAX_NAME_BYTES:
                spans[json.loads(self._body[position:after_name])] = start, end
            position = self._blanks(end)
            if self._at(position) == _OBJECT_END:
                self._expect_end(position + 1)
                return Found(opening, spans, empty=False)
            position = self._blanks(self._expect(_COMMA, position))
        raise too_many()

    def _value(self, position: int) -> int:
        """One value, however it is nested."""
        stack = bytearray()  # the end of each array and object that is open, innermost last
        while True:
            position, empty = self._open(position, stack)
            if not empty:
                first = self._at(position)
                position = self._string(position) if first == _QUOTE else self._word(position)
            position = self._close(position, stack)
            if not stack:
                return position
            position = self._expect(_COMMA, self._blanks(position))
            position = self._to_next_value(self._blanks(position), stack[-1])

    def _open(self, position: int, stack: bytearray) -> tuple[int, bool]:
        """Enter all arrays and objects that begin here, up to the first value inside the innermost
        one; returns its offset, and whether there is none."""
        while True:
            run = self._run(_match_openings, position)
            _push(stack, _not_brackets(b"", run).translate(_TO_ENDS))
            position = self._blanks(position + len(run))
            if self._at(position) == _OBJECT:  # what follows it reaches beyond the window
                _push(stack, b"}")
                position = self._blanks(position + 1)
                if self._at(position) == _OBJECT_END:
                    return position, True
                position = self._after_colon(self._string(position))
            elif self._at(position) != _ARRAY:
                break
        empty = self._at(position) in _ENDS and run.rstrip(_BLANK)[-1:] in _OPENINGS
        return position, empty and bool(run)

    def _close(self, position: int, stack: bytearray) -> int:
        """Leave all arrays and objects that end here, behind a value."""
        while stack:
            position = self._blanks(position)
            run = self._run(_match_ends, position)
            if not run:
                break
            ends = run.translate(None, _BLANK)
            if len(ends) > len(stack):
                # the last one ends the outermost object
                ends = ends[:-1]
                run = run[: run.rindex(_OBJECT_END)] if _OBJECT_END in run else b""
            if not ends or ends != stack[: -len(ends) - 1 : -1]:
                raise ValueError(f"an end that does not fit in the bytes from {position}")
            del stack[-len(ends) :]
            position += len(run if stack else run.rstrip(_BLANK))
        return position

    def _to_next_value(self, position: int, end: int) -> int:
        """Skip the items or members that the patterns match; returns the offset of the value that
        they don't."""
        match = _match_members if end == _OBJECT_END else _match_items
        while run := self._run(match, position):
            position += len(run)
        # the window may have ended among the blanks behind a comma
        position = self._blanks(position)
        return self._after_colon(self._string(position)) if end == _OBJECT_END else position

    def _run(self, match: _Match, position: int) -> bytes:
        """What a pattern matches here, within the window."""
        run = match(self._body, position, position + self._window)[0]  # type: ignore[index]
        self._spend(len(run) + _TOKEN_COST)
        return run

    def _after_colon(self, position: int) -> int:
        return self._blanks(self._expect(_COLON, self._blanks(position)))

    def _blanks(self, position: int) -> int:
        while True:
            end = _match_blanks(self._body, position, position + self._window).end()  # type: ignore[union-attr]
            if end < position + self._window:
                return end
            self._spend(end - position)
            position = end

    def _string(self, position: int) -> int:
        position = self._expect(_QUOTE, position)
        while True:
            end = _match_inside(self._body, position, position + self._window).end()  # type: ignore[union-attr]
            self._spend(end - position + _TOKEN_COST)
            if self._at(end) == _QUOTE:
                return end + 1
            # the window may have cut an escape
            if end == position or end >= len(self._body):
                raise ValueError(f"malformed string at byte {end}")
            position = end

    def _word(self, position: int) -> int:
        """A number, ``true``, ``false`` or ``null``."""
        limit = position + self._window
        found = _match_word(self._body, position, limit)
        if found is None:
            raise ValueError(f"a value expected at byte {position}")
        # an exponent has up to three characters that do not match without the next one
        if found.end() > limit - 4 and limit < len(self._body):
            raise ValueError(f"the number at byte {position} is too long")
        self._spend(found.end() - position + _TOKEN_COST)
        return found.end()

    def _at(self, position: int) -> int:
        return self._body[position] if position < len(self._body) else -1

    def _expect(self, character: int, position: int) -> int:
        if self._at(position) != character:
            raise ValueError(f"{chr(character)!r} expected at byte {position}")
        return position + 1

    def _expect_end(self, position: int) -> None:
        if self._blanks(position) != len(self._body):
            raise ValueError("data after the object")

    def _spend(self, amount: int) -> None:
        self._budget -= amount
        if self._budget < 0:
            self._budget = self._window
            self._pause()
