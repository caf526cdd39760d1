"""The answers in their dialects: OpenAI chat, completions and responses, Anthropic messages.

Every function turns a :class:`Job` into a JSON body or into an event stream; the shapes are those
that the ``openai`` (3.x) and ``anthropic`` (2.x) clients parse.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from gateway.simulator.catalogue import JsonObject
from gateway.simulator.delivery import EventStream


@dataclass(frozen=True)
class Job:
    """What is to be said: the text's tokens, or the argument pieces of a call of ``tool``.

    ``model`` is the name the client hears, ``cut`` says that the token limit ended the text.
    """

    model: str
    prompt_tokens: int
    tokens: list[str]
    cut: bool = False
    tool: str | None = None
    serial: str = field(default_factory=lambda: uuid4().hex[:24])
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def text(self) -> str:
        """The whole text, or the arguments as JSON."""
        return "".join(self.tokens)

    def reason(self, stop: str, length: str, tool: str) -> str:
        """Choose a dialect's word for why the answer ends."""
        return tool if self.tool else length if self.cut else stop


def _compact(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _data(content: Any) -> bytes:
    return f"data: {_compact(content)}\n\n".encode()


_MARK = "\x00token\x00"


def _per_token(event: bytes, tokens: list[str]) -> Iterator[bytes]:
    """Put each token where the mark stands: the rest of the event is built only once."""
    before, after = event.split(json.dumps(_MARK).encode())
    for token in tokens:
        yield before + json.dumps(token, ensure_ascii=False).encode() + after


# -- OpenAI chat and completions


def _openai_usage(job: Job) -> JsonObject:
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": len(job.tokens),
        "total_tokens": job.prompt_tokens + len(job.tokens),
    }


def _openai(job: Job, prefix: str, kind: str, choices: list[JsonObject]) -> JsonObject:
    return {
        "id": f"{prefix}-{job.serial}",
        "object": kind,
        "created": job.created,
        "model": job.model,
        "system_fingerprint": job.model,
        "choices": choices,
    }


def _tool_call(job: Job, arguments: str) -> JsonObject:
    function = {"name": job.tool, "arguments": arguments}
    return {"id": f"call_{job.serial}", "type": "function", "function": function}


def chat(job: Job) -> JsonObject:
    """Return a ``chat.completion``."""
    message: JsonObject = {"role": "assistant", "content": job.text, "tool_calls": []}
    if job.tool:
        message |= {"content": None, "tool_calls": [_tool_call(job, job.text)]}
    reason = job.reason("stop", "length", "tool_calls")
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    body = _openai(job, "chatcmpl", "chat.completion", [choice])
    return body | {"usage": _openai_usage(job), "stats": {}}


def chat_stream(job: Job, include_usage: bool) -> EventStream:
    """Return ``chat.completion.chunk`` events up to ``[DONE]``; the role comes with a token."""

    def chunk(delta: JsonObject, reason: str | None = None) -> JsonObject:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _openai(job, "chatcmpl", "chat.completion.chunk", [choice])

    def events() -> Iterator[bytes]:
        role = {"role": "assistant"}
        if job.tool:
            yield _data(chunk({**role, "tool_calls": [{"index": 0, **_tool_call(job, "")}]}))
            rest = {"tool_calls": [{"index": 0, "function": {"arguments": _MARK}}]}
            yield from _per_token(_data(chunk(rest)), job.tokens)
        else:
            yield from _per_token(_data(chunk({**role, "content": _MARK})), job.tokens[:1])
            yield from _per_token(_data(chunk({"content": _MARK})), job.tokens[1:])

    last = _data(chunk({}, job.reason("stop", "length", "tool_calls")))
    usage = _openai(job, "chatcmpl", "chat.completion.chunk", []) | {"usage": _openai_usage(job)}
    return EventStream([], events(), _openai_closing(last, usage, include_usage))


def completion(job: Job) -> JsonObject:
    """Return a ``text_completion``."""
    reason = job.reason("stop", "length", "stop")
    choice = {"index": 0, "text": job.text, "logprobs": None, "finish_reason": reason}
    body = _openai(job, "cmpl", "text_completion", [choice])
    return body | {"usage": _openai_usage(job), "stats": {}}


def completion_stream(job: Job, include_usage: bool) -> EventStream:
    """Return ``text_completion`` events up to ``[DONE]``."""

    def chunk(text: str, reason: str | None = None) -> JsonObject:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return _openai(job, "cmpl", "text_completion", [choice])

    last = _data(chunk("", job.reason("stop", "length", "stop")))
    usage = _openai(job, "cmpl", "text_completion", []) | {"usage": _openai_usage(job)}
    tokens = _per_token(_data(chunk(_MARK)), job.tokens)
    return EventStream([], tokens, _openai_closing(last, usage, include_usage))


def _openai_closing(last: bytes, usage: JsonObject, include_usage: bool) -> list[bytes]:
    return [last, *([_data(usage)] if include_usage else []), b"data: [DONE]\n\n"]


# -- OpenAI responses


def _response(job: Job, status: str, output: list[JsonObject], done: bool) -> JsonObject:
    usage = {
        "input_tokens": job.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": len(job.tokens),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": job.prompt_tokens + len(job.tokens),
    }
    return {
        "id": f"resp_{job.serial}",
        "object": "response",
        "created_at": job.created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if done and job.cut else None,
        "instructions": None,
        "max_output_tokens": None,
        "model": job.model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": usage if done else None,
        "user": None,
        "metadata": {},
    }


def _output_text(text: str) -> JsonObject:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _output_item(job: Job, done: bool) -> JsonObject:
    status = "in_progress" if not done else "incomplete" if job.cut else "completed"
    if job.tool:
        return {
            "type": "function_call",
            "id": f"fc_{job.serial}",
            "call_id": f"call_{job.serial}",
            "name": job.tool,
            "arguments": job.text if done else "",
            "status": status,
        }
    return {
        "type": "message",
        "id": f"msg_{job.serial}",
        "status": status,
        "role": "assistant",
        "content": [_output_text(job.text)] if done else [],
    }


def response(job: Job) -> JsonObject:
    """Return a ``response`` object."""
    status = "incomplete" if job.cut else "completed"
    return _response(job, status, [_output_item(job, done=True)], done=True)


def response_stream(job: Job) -> EventStream:
    """Return the events ``response.created`` … ``response.completed``, numbered in sequence."""
    number = iter(range(1_000_000))

    def event(kind: str, **more: Any) -> bytes:
        content = {"type": kind, "sequence_number": next(number), **more}
        return f"event: {kind}\n".encode() + _data(content)

    item = _output_item(job, done=False)
    place = {"item_id": item["id"], "output_index": 0}
    part = place if job.tool else {**place, "content_index": 0}
    plain = _response(job, "in_progress", [], done=False)
    opening = [
        event("response.created", response=plain),
        event("response.in_progress", response=plain),
        event("response.output_item.added", output_index=0, item=item),
    ]
    if not job.tool:
        opening.append(event("response.content_part.added", **part, part=_output_text("")))
    kind = "function_call_arguments" if job.tool else "output_text"
    logprobs: JsonObject = {} if job.tool else {"logprobs": []}
    tokens = [event(f"response.{kind}.delta", **part, delta=one, **logprobs) for one in job.tokens]
    final = response(job)
    if job.tool:
        closing = [event(f"response.{kind}.done", **part, name=job.tool, arguments=job.text)]
    else:
        closing = [
            event(f"response.{kind}.done", **part, text=job.text, **logprobs),
            event("response.content_part.done", **part, part=_output_text(job.text)),
        ]
    closing.append(event("response.output_item.done", output_index=0, item=final["output"][0]))
    closing.append(event(f"response.{final['status']}", response=final))
    return EventStream(opening, tokens, closing)


# -- Anthropic messages


def message(job: Job) -> JsonObject:
    """Return an Anthropic ``message``."""
    content: JsonObject = {"type": "text", "text": job.text}
    if job.tool:
        content = _tool_use(job) | {"input": json.loads(job.text)}
    return {
        "id": f"msg_{job.serial}",
        "type": "message",
        "role": "assistant",
        "model": job.model,
        "content": [content],
        "stop_reason": job.reason("end_turn", "max_tokens", "tool_use"),
        "stop_sequence": None,
        "usage": {"input_tokens": job.prompt_tokens, "output_tokens": len(job.tokens)},
    }


def _tool_use(job: Job) -> JsonObject:
    return {"type": "tool_use", "id": f"toolu_{job.serial}", "name": job.tool, "input": {}}


def message_stream(job: Job) -> EventStream:
    """Return the events ``message_start`` … ``message_stop``."""

    def event(kind: str, **more: Any) -> bytes:
        return f"event: {kind}\n".encode() + _data({"type": kind, **more})

    start = message(job) | {"content": [], "stop_reason": None}
    start["usage"] = {"input_tokens": job.prompt_tokens, "output_tokens": 0}
    block = _tool_use(job) if job.tool else {"type": "text", "text": ""}
    kind, name = ("input_json_delta", "partial_json") if job.tool else ("text_delta", "text")
    delta = event("content_block_delta", index=0, delta={"type": kind, name: _MARK})
    reason = job.reason("end_turn", "max_tokens", "tool_use")
    return EventStream(
        [
            event("message_start", message=start),
            event("content_block_start", index=0, content_block=block),
        ],
        _per_token(delta, job.tokens),
        [
            event("content_block_stop", index=0),
            event(
                "message_delta",
                delta={"stop_reason": reason, "stop_sequence": None},
                usage={"output_tokens": len(job.tokens)},
            ),
            event("message_stop"),
        ],
    )


#: Endpoint below ``/v1/`` → (plain form, stream form taking "include usage").
FORMS: dict[str, tuple[Callable[[Job], JsonObject], Callable[[Job, bool], EventStream]]] = {
    "chat/completions": (chat, chat_stream),
    "completions": (completion, completion_stream),
    "responses": (response, lambda job, include_usage: response_stream(job)),
    "messages": (message, lambda job, include_usage: message_stream(job)),
}
