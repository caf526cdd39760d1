"""Reads the members of a JSON object, and replaces or adds some in place.

A body is never decoded and encoded again. Members are spliced into the client's own bytes, so that
big integers, floats, escapes, duplicates and the order of all other members arrive as they were
sent.
"""

from __future__ import annotations

import codecs
import json
import re
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

import gevent

from gateway.errors import BadRequest
from gateway.proxy import json_scan
from gateway.proxy.json_scan import MAX_MEMBERS, Found

#: Larger bodies are scanned piece by piece, and most of their values are not built.
LARGE = 65536
#: The members whose values :mod:`.injection` reads.
_READ = frozenset({"model", "stream", "stream_options"})
#: Stands for a value that was not read.
UNREAD: Any = object()


class Members:
    """The members of a JSON object and their positions in the client's bytes.

    Raises BadRequest (``invalid_json``) for anything but a JSON object in UTF-8, for one with more
    than 1,000 members, and for one that is nested too deeply.
    """

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._text = ""
        if body.startswith(codecs.BOM_UTF8):
            raise _invalid("it begins with a byte-order mark (U+FEFF)")
        try:
            if len(body) > LARGE:
                found = json_scan.scan(body, gevent.sleep)
                values = {name: self._read(name, span) for name, span in found.spans.items()}
            else:
                self._text = body.decode("utf-8")
                found, values = _scan(self._text)
        except UnicodeDecodeError:
            raise _invalid("not UTF-8") from None
        except RecursionError:
            raise _invalid("nested too deeply") from None
        except (ValueError, StopIteration) as fault:
            raise _invalid(str(fault) or "not JSON") from None
        self._opening, self._spans, self._empty = found
        #: Values by name, numbers as their text; UNREAD where nobody asks for the value. The last
        #: one of duplicates counts. A string of more than 64 KB has only its beginning here.
        self.values: dict[str, Any] = values

    def with_injected(self, inject: dict[str, str]) -> bytes:
        """Return the body with members (name → JSON text) replaced or added; the very same bytes
        object if there are none."""
        if not inject:
            return self._body
        body = memoryview(self._body)
        pieces: list[bytes | memoryview] = [body[: self._opening + 1]]
        added = [f'"{name}":{text}' for name, text in inject.items() if name not in self._spans]
        if added:
            pieces.append(_encode(",".join(added) + ("" if self._empty else ",")))
        position = self._opening + 1
        for start, end, name in sorted((*self.span(n), n) for n in inject if n in self._spans):
            pieces += [body[position:start], _encode(inject[name])]
            position = end
        return b"".join([*pieces, body[position:]])

    def raw(self, name: str) -> str:
        """Return a member's value as the client wrote it."""
        start, end = self.span(name)
        return self._body[start:end].decode()

    def span(self, name: str) -> tuple[int, int]:
        """Return where a value starts and ends in the body, in bytes."""
        start, end = self._spans[name]
        if not self._text or len(self._text) == len(self._body):
            return start, end
        before = len(self._text[:start].encode())
        return before, before + len(self._text[start:end].encode())

    def _read(self, name: str, span: tuple[int, int]) -> Any:
        """Parse a value of a large body if it is needed."""
        if name not in _READ:
            return UNREAD
        start, end = span
        if end - start <= LARGE:
            return _scan_once(self._body[start:end].decode(), 0)[0]
        return json_scan.beginning(self._body, start) or UNREAD


def _scan(text: str) -> tuple[Found, dict[str, Any]]:
    """Return the members of the outermost object, with offsets in characters, and their values."""
    spans: dict[str, tuple[int, int]] = {}
    values: dict[str, Any] = {}
    opening = position = _skip_whitespace(text, 0)
    _expect("{", text, position)
    position = _skip_whitespace(text, position + 1)
    if text[position : position + 1] == "}":
        _expect_end(text, position + 1)
        return Found(opening, spans, empty=True), values
    for _ in range(MAX_MEMBERS):
        _expect('"', text, position)
        name, position = scanstring(text, position + 1, True)
        position = _skip_whitespace(text, position)
        _expect(":", text, position)
        start = _skip_whitespace(text, position + 1)
        values[name], position = _scan_once(text, start)
        spans[name] = start, position
        position = _skip_whitespace(text, position)
        if text[position : position + 1] == "}":
            _expect_end(text, position + 1)
            json_scan.check_depth(text)
            return Found(opening, spans, empty=False), values
        _expect(",", text, position)
        position = _skip_whitespace(text, position + 1)
    raise json_scan.too_many()


def _expect_end(text: str, position: int) -> None:
    if _skip_whitespace(text, position) != len(text):
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
