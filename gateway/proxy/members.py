"""Reads the members of a JSON object, and replaces or adds some in place.

A body is never decoded and encoded again. Members are spliced into the client's own bytes, so that
big integers, floats, escapes, duplicates and the order of all other members arrive as they were
sent.
"""

from __future__ import annotations

import json
import re
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

from gateway.errors import BadRequest


class Members:
    """The members of a JSON object and their positions in the client's bytes.

    Raises BadRequest (``invalid_json``) for anything but a JSON object in UTF-8.
    """

    def __init__(self, body: bytes) -> None:
        self._body = body
        try:
            self._text = body.decode("utf-8")
            self._spans = self._scan()
        except UnicodeDecodeError:
            raise _invalid("not UTF-8") from None
        except RecursionError:
            raise _invalid("nested too deeply") from None
        except (ValueError, StopIteration) as fault:
            raise _invalid(str(fault) or "not JSON") from None
        #: Parsed values by name, numbers as their text. The last one of duplicates counts.
        self.values: dict[str, Any] = {name: span[0] for name, span in self._spans.items()}

    def with_injected(self, inject: dict[str, str]) -> bytes:
        """Return the body with members (name → JSON text) replaced or added; the very same bytes
        object if there are none."""
        if not inject:
            return self._body
        # from the end, so that the offsets of earlier members stay valid
        replaced = sorted((name for name in inject if name in self._spans), key=self._start)
        body = self._body
        for name in reversed(replaced):
            start, end = self._byte_span(name)
            body = body[:start] + _encode(inject[name]) + body[end:]
        added = [f'"{name}":{text}' for name, text in inject.items() if name not in self._spans]
        if not added:
            return body
        opening = self._opening + 1
        comma = "," if self._spans else ""
        return body[:opening] + _encode(",".join(added) + comma) + body[opening:]

    def raw(self, name: str) -> str:
        """Return a member's value as the client wrote it."""
        _, start, end = self._spans[name]
        return self._text[start:end]

    def _start(self, name: str) -> int:
        return self._spans[name][1]

    def _byte_span(self, name: str) -> tuple[int, int]:
        """Where a value starts and ends in the body, in bytes."""
        _, start, end = self._spans[name]
        if len(self._text) == len(self._body):
            return start, end
        before = len(self._text[:start].encode())
        return before, before + len(self._text[start:end].encode())

    def _scan(self) -> dict[str, tuple[Any, int, int]]:
        """Return name → (value, start, end), with offsets in the text, of the outermost object."""
        text = self._text
        spans: dict[str, tuple[Any, int, int]] = {}
        position = self._opening = _skip_whitespace(text, 0)
        _expect("{", text, position)
        position = _skip_whitespace(text, position + 1)
        if text[position : position + 1] == "}":
            self._expect_end(position + 1)
            return spans
        while True:
            _expect('"', text, position)
            name, position = scanstring(text, position + 1, True)
            position = _skip_whitespace(text, position)
            _expect(":", text, position)
            start = _skip_whitespace(text, position + 1)
            value, position = _scan_once(text, start)
            spans[name] = (value, start, position)
            position = _skip_whitespace(text, position)
            if text[position : position + 1] == "}":
                self._expect_end(position + 1)
                return spans
            _expect(",", text, position)
            position = _skip_whitespace(text, position + 1)

    def _expect_end(self, position: int) -> None:
        if _skip_whitespace(self._text, position) != len(self._text):
            raise ValueError("data after the object")


def _encode(text: str) -> bytes:
    # an administrator may have sent a lone surrogate, which only exists as an escape
    return text.encode("utf-8", "backslashreplace")


def _invalid(fault: str) -> BadRequest:
    return BadRequest(f"The body is not a valid JSON object: {fault}.", code="invalid_json")


def _expect(character: str, text: str, position: int) -> None:
    if text[position : position + 1] != character:
        raise ValueError(f"{character!r} expected at character {position}")


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _keep_text(number: str) -> str:
    # numbers are not used here: keeping their text avoids a digit limit, lost precision and work
    return number


_scan_once = json.JSONDecoder(
    parse_float=_keep_text, parse_int=_keep_text, parse_constant=_reject_constant
).scan_once  # type: ignore[attr-defined]

_WHITESPACE = re.compile(r"[ \t\n\r]*")


def _skip_whitespace(text: str, position: int) -> int:
    return _WHITESPACE.match(text, position).end()  # type: ignore[union-attr]
