"""LM Studio's HTTP API: which model a request means, and what it is to say in which dialect.

The dialects have the shapes that the clients ``openai`` 3.x and ``anthropic`` 2.x parse.
"""

from __future__ import annotations

import json
import re
import struct
import time
from base64 import b64encode
from collections import deque
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import chain, count
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote
from uuid import uuid4

import gevent

from gateway.simulator.models import MODELS, Instance, JsonObject, Refusal

if TYPE_CHECKING:
    from gateway.simulator.server import Handler, Simulator

_JSON = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), default=lambda raw: b64encode(raw).decode()
)
_MARK = "\0token\0"
_OVERFLOW = "The number of tokens to keep from the prompt is greater than the context length."
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_SAMPLES: JsonObject = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}
#: Endpoint below ``/v1/`` → the field that holds what the answer is to.
_FIELDS = {
    "chat/completions": "messages", "completions": "prompt", "responses": "input",
    "messages": "messages", "embeddings": "input",
}  # fmt: skip
#: An answer as a whole, and as server-sent events: opening ones, tokens (they are paced), closing.
Reply = tuple[JsonObject, list[bytes], Iterable[bytes], list[bytes]]


class Job(NamedTuple):
    """What is to be said: the tokens of a text, or of the arguments for a call of ``tool``."""

    model: str  #: the name the client hears
    prompt: int  #: tokens of the prompt
    tokens: list[str]
    cut: bool = False  #: the token limit ended the text
    tool: str | None = None


class Answer:
    """JSON, a text or a reply to be streamed; header names have ``_`` for ``-``."""

    def __init__(self, content: Any, status: int = 200, **headers: str) -> None:
        self.content, self.status = content, status
        self.headers = {name.replace("_", "-"): text for name, text in headers.items()}


def failure(status: int, message: str, param: str | None = None, **more: str) -> Answer:
    """Return an error object in OpenAI's form."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    return Answer({"error": error | more}, status)


def encoded(content: Any) -> bytes:
    """Return JSON in UTF-8; bytes are base64, and a lone surrogate stays a JSON escape."""
    return _JSON.encode(content).encode(errors="backslashreplace")


def respond(handler: Handler, body: bytes) -> Answer:
    """Answer one request."""
    simulator, method, path = handler.simulator, handler.command, handler.path.partition("?")[0]
    if path == "/lmstudio-greeting":
        return Answer({"lmstudio": True})
    if simulator.token and handler.headers.get("Authorization") != f"Bearer {simulator.token}":
        message = "Malformed or missing API token. Provide it as: Authorization: Bearer sk-lm-…"
        return failure(401, message, type="invalid_request", code="invalid_api_key")
    instances = list(simulator.memory.instances.values())
    same = {"object": "model", "owned_by": "organization_owner", "created": 0}
    names = [*MODELS, *(one.identifier for one in instances)]
    models = {name: {"id": name, **same} for name in names}
    match "GET" if method == "HEAD" else method, path.removeprefix("/v1/"):
        case "GET", "models":
            return Answer({"object": "list", "data": list(models.values())})
        case "GET", endpoint if endpoint.startswith("models/"):
            name = unquote(endpoint.removeprefix("models/"))
            unknown = failure(404, f'Model "{name}" not found', "model", code="model_not_found")
            return Answer(models[name]) if name in models else unknown
        case "GET", "/api/v0/models" | "/api/v1/models":
            listed = [_native(model, instances) for model in MODELS.values()]
            return Answer({"object": "list", "data": listed, "models": listed})
        case "POST", endpoint if endpoint in _FIELDS:
            return _infer(handler, endpoint, body)
    return Answer({"error": f"Unexpected endpoint or method. ({method} {path})"})


def _native(model: JsonObject, instances: list[Instance]) -> JsonObject:
    """Return an entry of ``/api/v0/models`` and ``/api/v1/models``, with the names of both."""
    key, entry = model["modelKey"], {"arch": model["architecture"]}
    loaded = [{"id": one.identifier} for one in instances if one.modelKey == key]
    entry |= {re.sub("([A-Z])", r"_\1", name).lower(): model[name] for name in model}
    entry |= {"id": key, "key": key, "compatibility_type": model["format"]}
    return entry | {"state": "loaded" if loaded else "not-loaded", "loaded_instances": loaded}


def _infer(handler: Handler, endpoint: str, raw: bytes) -> Answer:
    """Answer what takes a model: with vectors, a stream or a whole text."""
    try:
        body = dict(json.loads(raw))
    except (ValueError, TypeError, RecursionError) as problem:
        return failure(400, f"The body must be a JSON object: {problem}")
    if (field := _FIELDS[endpoint]) not in body:
        return failure(400, f"'{field}' field is required", field)
    said = body[field] if isinstance(body[field], list) else [body[field]]
    namespace = "embedding" if endpoint == "embeddings" else "llm"
    instance = _instance(handler.simulator, str(body.get("model") or ""), namespace)
    if isinstance(instance, Answer):
        return instance
    instance.lastUsedTime = int(time.time() * 1000)
    if endpoint == "embeddings":
        return _embed(instance, [str(one) for one in said], body.get("encoding_format"))
    try:
        job = _job(instance, body, said)
    except (TypeError, AttributeError, LookupError, RecursionError) as problem:
        return failure(400, f"Invalid request: {problem}")
    if job.prompt > instance.contextLength:
        return Answer({"error": _OVERFLOW})
    if "big-answer" in handler.faults:
        job = job._replace(tokens=["word " * (1 << 20)])
    if endpoint in ("responses", "messages"):
        reply = _responses(job) if endpoint == "responses" else _messages(job)
    else:
        options = body.get("stream_options")
        with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        reply = _openai(job, endpoint == "chat/completions", with_usage)
    seconds = len(job.tokens) * handler.pace
    instance.lastUsedTime += int(seconds * 1000)
    if body.get("stream"):
        return Answer(reply, Cache_Control="no-cache", Connection="keep-alive")
    gevent.sleep(seconds)
    return Answer(reply[0])


def _instance(simulator: Simulator, name: str, namespace: str) -> Instance | Answer:
    """Find the loaded instance that a request means; a downloaded model is loaded for it."""
    loaded = simulator.memory.of(namespace)
    if not name and len(loaded) != 1:
        return failure(400, "No models loaded. Load one with the `lms load` command.", "model")
    named = [one for one in loaded if one.identifier == name or not name]
    if fitting := named or [one for one in loaded if one.modelKey == name]:
        return fitting[0]
    if name not in MODELS and name not in simulator.memory.instances:
        hint = f'Invalid model identifier "{name}". Please specify a valid downloaded model.'
        return failure(400, hint, "model", code="model_not_found")
    new, flaw = Instance(namespace, name, ttlMs=3_600_000), simulator.switches.fail_loads
    try:
        deque(simulator.memory.load(new, flaw, 0.05), 0)  # just in time
    except Refusal as refusal:
        cause = refusal.error.get("cause", refusal)
        return failure(400, f'Failed to load model "{name}". Error: {cause}', "model")
    return new


def _text(content: Any) -> str:
    """Return the text of a content, which may be a string or a list of parts."""
    match content:
        case list():
            return " ".join(map(_text, content))
        case {"text": inner} | {"content": inner} | {"output": inner}:
            return _text(inner)
    return content if isinstance(content, str) else ""


def _job(instance: Instance, body: JsonObject, said: list[Any]) -> Job:
    """Decide what to say: a call of the first tool, a count, or who is speaking."""
    turns = [one if isinstance(one, dict) else {"role": "user", "content": one} for one in said]
    asked = next((_text(one) for one in reversed(turns) if one.get("role") == "user"), "")
    texts = [*map(_text, turns), _text(body.get("instructions") or body.get("system"))]
    job = Job(instance.identifier, sum(len(text.split()) for text in texts), [])
    tools, choice, last = body.get("tools"), body.get("tool_choice"), turns[-1] if turns else {}
    if isinstance(choice, dict):  # Anthropic's {"type": "any"}, or a function by name
        choice = "none" if choice.get("type") in ("auto", "none") else "required"
    answered = last.get("role") == "tool" or last.get("type") == "function_call_output"
    if tools and (choice == "required" or ("use the tool" in asked and not answered)):
        tool = tools[0].get("function", tools[0])
        schema = tool.get("parameters") or tool.get("input_schema") or {}
        types = {name: one.get("type") for name, one in (schema.get("properties") or {}).items()}
        arguments = json.dumps({name: _SAMPLES.get(types[name], "simulated") for name in types})
        return job._replace(tokens=re.findall(r"\S+\s*", arguments), tool=str(tool.get("name")))
    text = (
        f"This is the LM Studio simulator speaking as {MODELS[instance.modelKey]['displayName']}. "
        f"There is no model behind it. Your message has {len(asked.split())} words."
    )
    if number := re.search(r"count to (\d+)", asked):
        text = "".join(f"{one} " for one in range(1, int(number[1]) + 1))
    tokens = re.findall(r"\S+\s*", text)
    limits = [body[name] for name in _LIMITS if isinstance(body.get(name), int) and body[name] > 0]
    limit = min([*limits, len(tokens)])
    return job._replace(tokens=tokens[:limit], cut=limit < len(tokens))


def _embed(instance: Instance, texts: list[str], encoding: Any) -> Answer:
    """Answer with a vector for each text: the same for the same text, as numbers or in base64."""
    data: list[JsonObject] = []
    for text in texts:
        vector: Any = [byte / 255 - 0.5 for byte in sha256(encoded(text)).digest()[:8]]
        if encoding == "base64":
            vector = struct.pack("<8f", *vector)
        data.append({"object": "embedding", "index": len(data), "embedding": vector})
    words = sum(len(text.split()) for text in texts)
    usage = {"prompt_tokens": words, "total_tokens": words}
    model = instance.identifier
    return Answer({"object": "list", "data": data, "model": model, "usage": usage})


def _event(kind: str = "", **content: Any) -> bytes:
    """Return an event; its kind, if any, is its name and the type of its data."""
    if kind:
        return f"event: {kind}\n".encode() + _event(type=kind, **content)
    return b"data: %b\n\n" % encoded(content)


def _per_token(event: bytes, tokens: list[str]) -> Iterator[bytes]:
    """Put each token where the mark stands: the rest of the event is built only once."""
    before, _, after = event.partition(encoded(_MARK))
    for token in tokens:
        yield before + encoded(token) + after


def _openai(job: Job, chat: bool, with_usage: bool) -> Reply:
    """Answer ``chat/completions`` or ``completions``; a message's role comes with a token."""
    text, serial, reason = "".join(job.tokens), uuid4().hex, "length" if job.cut else "stop"
    kind, prefix = ("chat.completion", "chatcmpl") if chat else ("text_completion", "cmpl")
    base: JsonObject = {
        "id": f"{prefix}-{serial}", "object": kind, "created": int(time.time()),
        "model": job.model, "system_fingerprint": job.model, "choices": [],
    }  # fmt: skip
    usage = {"prompt_tokens": job.prompt, "completion_tokens": len(job.tokens)}
    usage["total_tokens"] = job.prompt + len(job.tokens)

    def choice(said: JsonObject, reason: str | None = None) -> JsonObject:
        return {"choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reason}]}

    def message(text: str, first: bool = True) -> JsonObject:
        role = {"role": "assistant"} if first else {}
        if not job.tool:
            return {**role, "content": text}
        named = {"id": f"call_{serial}", "type": "function"} if first else {}
        function = ({"name": job.tool} if first else {}) | {"arguments": text}
        return {**role, "tool_calls": [{"index": 0, **named, "function": function}]}

    said: JsonObject = {"text": text}
    first: JsonObject = {"text": _MARK}
    rest, last = first, first | {"text": ""}
    if chat:
        reason, base["object"] = "tool_calls" if job.tool else reason, "chat.completion.chunk"
        said = {"message": {"content": None, "tool_calls": [], **message(text)}}
        first, rest = {"delta": message(_MARK)}, {"delta": message(_MARK, first=False)}
        last = {"delta": {}}
    begun, more = _event(**base | choice(first)), _event(**base | choice(rest))
    tokens = chain(_per_token(begun, job.tokens[:1]), _per_token(more, job.tokens[1:]))
    closing = [_event(**base | choice(last, reason))]
    if with_usage:
        closing.append(_event(**base, usage=usage))
    whole = base | {"object": kind} | choice(said, reason) | {"usage": usage, "stats": {}}
    return whole, [], tokens, [*closing, b"data: [DONE]\n\n"]


def _responses(job: Job) -> Reply:
    """Answer ``responses``; its events are numbered in sequence."""
    text, serial, numbers = "".join(job.tokens), uuid4().hex, count()
    status = "incomplete" if job.cut else "completed"
    new: JsonObject = {
        "id": f"resp_{serial}", "object": "response", "created_at": int(time.time()),
        "model": job.model, "status": "in_progress", "output": [], "usage": None, "error": None,
        "incomplete_details": None, "instructions": None, "metadata": {}, "temperature": 1.0,
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "top_p": 1.0,
    }  # fmt: skip
    usage = {
        "input_tokens": job.prompt, "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": len(job.tokens), "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": job.prompt + len(job.tokens),
    }  # fmt: skip
    item: JsonObject = {"id": f"item_{serial}", "status": status}
    place: JsonObject = {"item_id": item["id"], "output_index": 0}
    parts: list[JsonObject] = []
    if job.tool:
        kind, said = "function_call_arguments", {"name": job.tool, "arguments": text}
        item |= {"type": "function_call", "call_id": f"call_{serial}", **said}
        begun = item | {"status": "in_progress", "arguments": ""}
    else:
        kind, said, place["content_index"] = "output_text", {"text": text}, 0
        parts = [{"type": kind, "text": text, "annotations": [], "logprobs": []}]
        item |= {"type": "message", "role": "assistant", "content": parts}
        begun = item | {"status": "in_progress", "content": []}
    cut = {"reason": "max_output_tokens"} if job.cut else None
    whole = new | {"status": status, "output": [item], "usage": usage, "incomplete_details": cut}

    def event(kind: str, **content: Any) -> bytes:
        return _event(f"response.{kind}", sequence_number=next(numbers), **content)

    opening = [event("created", response=new), event("in_progress", response=new)]
    opening += [event("output_item.added", output_index=0, item=begun)]
    opening += [event("content_part.added", **place, part=one | {"text": ""}) for one in parts]
    tokens = [event(f"{kind}.delta", **place, delta=one, logprobs=[]) for one in job.tokens]
    closing = [event(f"{kind}.done", **place, **said, logprobs=[])]
    closing += [event("content_part.done", **place, part=one) for one in parts]
    closing += [event("output_item.done", output_index=0, item=item)]
    return whole, opening, tokens, [*closing, event(status, response=whole)]


def _messages(job: Job) -> Reply:
    """Answer Anthropic's ``messages``."""
    block: JsonObject = {"type": "text", "text": ""}
    said: JsonObject = {"text": "".join(job.tokens)}
    piece, reason = {"type": "text_delta", "text": _MARK}, "max_tokens" if job.cut else "end_turn"
    if job.tool:
        block = {"type": "tool_use", "id": f"toolu_{uuid4().hex}", "name": job.tool, "input": {}}
        said, piece = {"input": json.loads(said["text"])}, {"type": "input_json_delta"}
        piece, reason = piece | {"partial_json": _MARK}, "tool_use"
    usage = {"input_tokens": job.prompt, "output_tokens": 0}
    used = {"output_tokens": len(job.tokens)}
    end = {"stop_reason": reason, "stop_sequence": None}
    new: JsonObject = {
        "id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "model": job.model,
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
    return whole, opening, _per_token(delta, job.tokens), closing
