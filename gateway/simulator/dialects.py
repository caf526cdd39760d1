"""The dialects: OpenAI's chat completions, completions and responses, and Anthropic's messages.

They have the shapes that the clients ``openai`` 3.x and ``anthropic`` 2.x parse.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import chain, count
from typing import Any, NamedTuple
from uuid import uuid4

from gateway.simulator.models import JsonObject
from gateway.simulator.response import Reply, encoded

_MARK = "\0token\0"


class Output(NamedTuple):
    """What a model generates: the tokens of a text, or of the arguments of a call to ``tool``."""

    model: str  #: the name that the client sees
    prompt: int  #: tokens of the prompt
    tokens: list[str]
    cut: bool = False  #: the token limit ended the text
    tool: str | None = None


def _event(kind: str = "", **content: Any) -> bytes:
    """Return an event; its kind, if any, is its name and the type of its data."""
    if kind:
        return f"event: {kind}\n".encode() + _event(type=kind, **content)
    return b"data: %b\n\n" % encoded(content)


def _per_token(event: bytes, tokens: list[str]) -> Iterator[bytes]:
    """Yield the event with each token in place of a placeholder; the rest is encoded only once."""
    before, _, after = event.partition(encoded(_MARK))
    for token in tokens:
        yield before + encoded(token) + after


def openai(output: Output, chat: bool, with_usage: bool) -> Reply:
    """Reply to ``chat/completions`` or ``completions``; the first token brings the role."""
    text, serial, reason = "".join(output.tokens), uuid4().hex, "length" if output.cut else "stop"
    kind, prefix = ("chat.completion", "chatcmpl") if chat else ("text_completion", "cmpl")
    base: JsonObject = {
        "id": f"{prefix}-{serial}", "object": kind, "created": int(time.time()),
        "model": output.model, "system_fingerprint": output.model, "choices": [],
    }  # fmt: skip
    usage = {"prompt_tokens": output.prompt, "completion_tokens": len(output.tokens)}
    usage["total_tokens"] = output.prompt + len(output.tokens)

    def choice(said: JsonObject, reason: str | None = None) -> JsonObject:
        return {"choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reason}]}

    def message(text: str, first: bool = True) -> JsonObject:
        role = {"role": "assistant"} if first else {}
        if not output.tool:
            return {**role, "content": text}
        named = {"id": f"call_{serial}", "type": "function"} if first else {}
        function = ({"name": output.tool} if first else {}) | {"arguments": text}
        return {**role, "tool_calls": [{"index": 0, **named, "function": function}]}

    said: JsonObject = {"text": text}
    first: JsonObject = {"text": _MARK}
    rest, last = first, first | {"text": ""}
    if chat:
        reason, base["object"] = "tool_calls" if output.tool else reason, "chat.completion.chunk"
        said = {"message": {"content": None, "tool_calls": [], **message(text)}}
        first, rest = {"delta": message(_MARK)}, {"delta": message(_MARK, first=False)}
        last = {"delta": {}}
    begun, more = _event(**base | choice(first)), _event(**base | choice(rest))
    tokens = chain(_per_token(begun, output.tokens[:1]), _per_token(more, output.tokens[1:]))
    closing = [_event(**base | choice(last, reason))]
    if with_usage:
        closing.append(_event(**base, usage=usage))
    whole = base | {"object": kind} | choice(said, reason) | {"usage": usage, "stats": {}}
    return whole, [], tokens, [*closing, b"data: [DONE]\n\n"]


def responses(output: Output) -> Reply:
    """Reply to ``responses``, whose events are numbered in sequence."""
    text, serial, numbers = "".join(output.tokens), uuid4().hex, count()
    status = "incomplete" if output.cut else "completed"
    new: JsonObject = {
        "id": f"resp_{serial}", "object": "response", "created_at": int(time.time()),
        "model": output.model, "status": "in_progress", "output": [], "usage": None, "error": None,
        "incomplete_details": None, "instructions": None, "metadata": {}, "temperature": 1.0,
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "top_p": 1.0,
    }  # fmt: skip
    usage = {
        "input_tokens": output.prompt, "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": len(output.tokens), "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": output.prompt + len(output.tokens),
    }  # fmt: skip
    item: JsonObject = {"id": f"item_{serial}", "status": status}
    place: JsonObject = {"item_id": item["id"], "output_index": 0}
    parts: list[JsonObject] = []
    if output.tool:
        kind, said = "function_call_arguments", {"name": output.tool, "arguments": text}
        item |= {"type": "function_call", "call_id": f"call_{serial}", **said}
        begun = item | {"status": "in_progress", "arguments": ""}
    else:
        kind, said, place["content_index"] = "output_text", {"text": text}, 0
        parts = [{"type": kind, "text": text, "annotations": [], "logprobs": []}]
        item |= {"type": "message", "role": "assistant", "content": parts}
        begun = item | {"status": "in_progress", "content": []}
    cut = {"reason": "max_output_tokens"} if output.cut else None
    whole = new | {"status": status, "output": [item], "usage": usage, "incomplete_details": cut}

    def event(kind: str, **content: Any) -> bytes:
        return _event(f"response.{kind}", sequence_number=next(numbers), **content)

    opening = [event("created", response=new), event("in_progress", response=new)]
    opening += [event("output_item.added", output_index=0, item=begun)]
    opening += [event("content_part.added", **place, part=one | {"text": ""}) for one in parts]
    tokens = [event(f"{kind}.delta", **place, delta=one, logprobs=[]) for one in output.tokens]
    closing = [event(f"{kind}.done", **place, **said, logprobs=[])]
    closing += [event("content_part.done", **place, part=one) for one in parts]
    closing += [event("output_item.done", output_index=0, item=item)]
    return whole, opening, tokens, [*closing, event(status, response=whole)]


def messages(output: Output) -> Reply:
    """Reply to Anthropic's ``messages``."""
    block: JsonObject = {"type": "text", "text": ""}
    said: JsonObject = {"text": "".join(output.tokens)}
    piece, reason = (
        {"type": "text_delta", "text": _MARK},
        "max_tokens" if output.cut else "end_turn",
    )
    if output.tool:
        block = {"type": "tool_use", "id": f"toolu_{uuid4().hex}", "name": output.tool, "input": {}}
        said, piece = {"input": json.loads(said["text"])}, {"type": "input_json_delta"}
        piece, reason = piece | {"partial_json": _MARK}, "tool_use"
    usage = {"input_tokens": output.prompt, "output_tokens": 0}
    used = {"output_tokens": len(output.tokens)}
    end = {"stop_reason": reason, "stop_sequence": None}
    new: JsonObject = {
        "id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "model": output.model,
        "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage,
    }  # fmt: skip
    opening = [_event("message_start", message=new)]
    opening += [_event("content_block_start", index=0, content_block=block)]
    delta = _event("content_block_delta", index=0, delta=piece)
    closing = [_event("content_block_stop", index=0)]
    closing += [
        _event("message_delta", delta=end, usage=used),
        _event("message_stop"),
    ]
    whole = new | {"content": [block | said], **end, "usage": usage | used}
    return whole, opening, _per_token(delta, output.tokens), closing
