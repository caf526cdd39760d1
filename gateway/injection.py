"""The injection table of the contract (§4), and injecting without touching anything else.

A body is never re-encoded: members are spliced into the client's own bytes, so that big integers,
floats, escapes, duplicates and the order of everything else arrive as they were sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

from gateway.errors import BadRequest
from gateway.store import Active


@dataclass(frozen=True)
class Endpoint:
    """One row of the table: contract name of a default → member of the request body."""

    members: dict[str, str]
    #: Only an active embedding model may be injected.
    embeddings: bool = False
    #: Whether the endpoint reports usage in a stream only when asked through ``stream_options``.
    usage_on_request: bool = False


_OPENAI = {
    "temperature": "temperature",
    "maxTokens": "max_tokens",
    "topP": "top_p",
    "topK": "top_k",
    "repeatPenalty": "repeat_penalty",
    "stopStrings": "stop",
    "stream": "stream",
}

#: Paths behind ``/v1`` where a model and parameters are injected.
TABLE: dict[str, Endpoint] = {
    "/v1/chat/completions": Endpoint(_OPENAI, usage_on_request=True),
    "/v1/completions": Endpoint(_OPENAI, usage_on_request=True),
    "/v1/responses": Endpoint(
        {
            "temperature": "temperature",
            "maxTokens": "max_output_tokens",
            "topP": "top_p",
            "stream": "stream",
        }
    ),
    "/v1/messages": Endpoint(
        {
            "temperature": "temperature",
            "maxTokens": "max_tokens",
            "topP": "top_p",
            "topK": "top_k",
            "stopStrings": "stop_sequences",
            "stream": "stream",
        }
    ),
    "/v1/embeddings": Endpoint({}, embeddings=True),
}

#: A member that stands in for another one: with it, nothing is injected for the other.
_INSTEAD = {"max_tokens": "max_completion_tokens"}

NO_ACTIVE_MODEL = (
    "The request names no model and none is active. Name one, or activate one: "
    'POST /admin/models/activate {"modelKey": "…"} or POST /admin/models/load.'
)


@dataclass(frozen=True)
class Prepared:
    """A body that is ready to go upstream, and what the relay needs to know about it."""

    body: bytes
    #: The model as asked for by the client (None: none) and as it goes upstream.
    asked_model: str | None
    model: str
    stream: bool
    #: Whether the gateway, not the client, asked for the stream's usage chunk.
    added_usage: bool


def prepare(endpoint: Endpoint, body: bytes, active: Callable[[], Active | None]) -> Prepared:
    """Inject into a JSON body what the client left out.

    Raises BadRequest: ``invalid_json`` for what is not a JSON object in UTF-8, ``no_active_model``
    where a model is needed and none can be injected.
    """
    members = Members(body)
    asked = members.values.get("model")
    inject: dict[str, str] = {}
    current = active()
    model = asked
    if asked is None or asked == "":
        if current is None or (endpoint.embeddings and current.model_type != "embedding"):
            raise BadRequest(NO_ACTIVE_MODEL, code="no_active_model", param="model")
        model = current.model
        inject["model"] = json.dumps(model, ensure_ascii=False)
    if current is not None:
        for name, text in current.default_texts.items():
            member = endpoint.members.get(name)
            if (
                member
                and member not in members.values
                and _INSTEAD.get(member) not in members.values
            ):
                inject[member] = text
    streams = members.values.get("stream") is True or inject.get("stream") == "true"
    added_usage = streams and endpoint.usage_on_request and _ask_for_usage(members, inject)
    return Prepared(
        members.with_injected(inject),
        asked if isinstance(asked, str) else None,
        model if isinstance(model, str) else "",
        streams,
        added_usage,
    )


class Members:
    """The members of a JSON object, each with its place in the client's bytes."""

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
        #: Parsed values by name; numbers are left as their text. Of duplicates the last one counts.
        self.values: dict[str, Any] = {name: span[0] for name, span in self._spans.items()}

    def with_injected(self, inject: dict[str, str]) -> bytes:
        """The client's bytes with members (name → JSON text) put in; the same object if none."""
        if not inject:
            return self._body
        # from the end, so that the places in front of it stay right
        replaced = sorted((name for name in inject if name in self._spans), key=self._start)
        body = self._body
        for name in reversed(replaced):
            start, end = self._place(name)
            body = body[:start] + _encode(inject[name]) + body[end:]
        added = [f'"{name}":{text}' for name, text in inject.items() if name not in self._spans]
        if not added:
            return body
        opening = self._opening + 1
        comma = "," if self._spans else ""
        return body[:opening] + _encode(",".join(added) + comma) + body[opening:]

    def raw(self, name: str) -> str:
        """A member's value as the client wrote it."""
        _, start, end = self._spans[name]
        return self._text[start:end]

    def _start(self, name: str) -> int:
        return self._spans[name][1]

    def _place(self, name: str) -> tuple[int, int]:
        """Byte offsets of a value."""
        _, start, end = self._spans[name]
        if len(self._text) == len(self._body):
            return start, end
        before = len(self._text[:start].encode())
        return before, before + len(self._text[start:end].encode())

    def _scan(self) -> dict[str, tuple[Any, int, int]]:
        """Name → value, start and end in the text. Only the outermost object is looked at."""
        text = self._text
        spans: dict[str, tuple[Any, int, int]] = {}
        position = self._opening = _skip(text, 0)
        _expect("{", text, position)
        position = _skip(text, position + 1)
        if text[position : position + 1] == "}":
            self._end(position + 1)
            return spans
        while True:
            _expect('"', text, position)
            name, position = scanstring(text, position + 1, True)
            position = _skip(text, position)
            _expect(":", text, position)
            start = _skip(text, position + 1)
            value, position = _scan_once(text, start)
            spans[name] = (value, start, position)
            position = _skip(text, position)
            if text[position : position + 1] == "}":
                self._end(position + 1)
                return spans
            _expect(",", text, position)
            position = _skip(text, position + 1)

    def _end(self, position: int) -> None:
        if _skip(self._text, position) != len(self._text):
            raise ValueError("something follows the object")


def _ask_for_usage(members: Members, inject: dict[str, str]) -> bool:
    """Ask LM Studio for the usage chunk if the client did not; returns whether it was added."""
    options = members.values.get("stream_options")
    if options is None:
        inject["stream_options"] = '{"include_usage":true}'
        return True
    if not isinstance(options, dict) or options.get("include_usage") is True:
        return False
    raw = members.raw("stream_options").encode()
    inject["stream_options"] = Members(raw).with_injected({"include_usage": "true"}).decode()
    return True


def _encode(text: str) -> bytes:
    # a lone surrogate, which an administrator may have sent as an escape, stays an escape
    return text.encode("utf-8", "backslashreplace")


def _invalid(fault: str) -> BadRequest:
    return BadRequest(f"The body is not a valid JSON object: {fault}.", code="invalid_json")


def _expect(character: str, text: str, position: int) -> None:
    if text[position : position + 1] != character:
        raise ValueError(f"{character!r} expected at character {position}")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _text_of(number: str) -> str:
    # numbers are not needed as numbers: no limit of digits, no loss of precision, no work
    return number


_scan_once = json.JSONDecoder(
    parse_float=_text_of, parse_int=_text_of, parse_constant=_refuse_constant
).scan_once  # type: ignore[attr-defined]

_WHITE_SPACE = re.compile(r"[ \t\n\r]*")


def _skip(text: str, position: int) -> int:
    return _WHITE_SPACE.match(text, position).end()  # type: ignore[union-attr]
