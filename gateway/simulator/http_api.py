"""LM Studio's HTTP API: which model a request means, what it is answered (lmstudio.md, 3)."""

from __future__ import annotations

import json
import re
import struct
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from typing import Any
from urllib.parse import unquote

from gateway.simulator.catalogue import MODELS, JsonObject, Model
from gateway.simulator.delivery import Answer, EventStream, error_answer, json_answer
from gateway.simulator.dialects import FORMS, Job
from gateway.simulator.exchange import Exchange
from gateway.simulator.faults import Knobs
from gateway.simulator.listings import (
    loaded_of,
    native_models_v0,
    native_models_v1,
    one_model,
    openai_models,
)
from gateway.simulator.memory import Instance, Memory, Refusal
from gateway.simulator.state import Simulator

_EMBEDDING_SIZE = 8
_BIG_ANSWER_BYTES = 5 << 20
_OVERFLOW = (
    "The number of tokens to keep from the initial prompt is greater than the context length. "
    "Try to load the model with a larger context length, or provide a shorter input"
)


class _Failure(Exception):
    """Carries an error answer out of the middle of a request."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


def respond(simulator: Simulator, exchange: Exchange, knobs: Knobs) -> Answer | EventStream:
    """Answer one request of the HTTP API."""
    try:
        return _route(simulator, exchange, knobs)
    except _Failure as failure:
        return failure.answer


def _route(simulator: Simulator, exchange: Exchange, knobs: Knobs) -> Answer | EventStream:
    method = "GET" if exchange.method == "HEAD" else exchange.method
    if (method, exchange.path) == ("GET", "/lmstudio-greeting"):
        return json_answer({"lmstudio": True})
    if simulator.token and exchange.header("authorization") != f"Bearer {simulator.token}":
        return _unauthorized()
    listings: dict[str, Callable[[Memory], JsonObject]] = {
        "/v1/models": openai_models,
        "/api/v0/models": native_models_v0,
        "/api/v1/models": native_models_v1,
    }
    if method == "GET" and exchange.path in listings:
        return json_answer(listings[exchange.path](simulator.memory))
    if method == "GET" and exchange.path.startswith("/v1/models/"):
        return one_model(simulator.memory, unquote(exchange.path.removeprefix("/v1/models/")))
    endpoint = exchange.path.removeprefix("/v1/")
    if method == "POST" and exchange.path == "/v1/embeddings":
        return _embed(simulator.memory, _json_object(exchange.body))
    if method == "POST" and exchange.path == f"/v1/{endpoint}" and endpoint in FORMS:
        return _generate(simulator.memory, endpoint, _json_object(exchange.body), knobs)
    unexpected = f"Unexpected endpoint or method. ({exchange.method} {exchange.path})"
    return json_answer({"error": unexpected})


def _unauthorized() -> Answer:
    message = "Malformed or missing API token. Provide it as: Authorization: Bearer sk-lm-…"
    error = {"type": "invalid_request", "code": "invalid_api_key", "message": message}
    return json_answer({"error": error}, 401)


def _json_object(body: bytes) -> JsonObject:
    try:
        content = json.loads(body)
    except ValueError as error:
        raise _Failure(error_answer(400, f"Invalid JSON: {error}")) from None
    if not isinstance(content, dict):
        raise _Failure(error_answer(400, "The body must be a JSON object."))
    return content


def _instance_for(memory: Memory, body: JsonObject, namespace: str) -> Instance:
    """Find the loaded instance that a request means; a downloaded model is loaded for it."""
    name = body.get("model")
    if not name:
        loaded = memory.of(namespace)
        if len(loaded) == 1:
            return loaded[0]
        message = "Please load a model in the developer page or use the `lms load` command."
        raise _Failure(error_answer(400, f"No models loaded. {message}", "model"))
    instance = memory.instances.get(str(name))
    model = instance.model if instance else MODELS.get(str(name))
    if model is None:
        message = f'Invalid model identifier "{name}". Please specify a valid downloaded model.'
        raise _Failure(error_answer(400, message, "model", "model_not_found"))
    if model.type != namespace:
        message = f'Model "{name}" is of the type {model.type}, expected {namespace}.'
        raise _Failure(error_answer(400, message, "model"))
    if instance is None:
        instance = next(iter(loaded_of(memory, model)), None) or _loaded_now(memory, model)
    return instance


def _loaded_now(memory: Memory, model: Model) -> Instance:
    try:
        return memory.load_just_in_time(model)
    except Refusal as refusal:
        message = f'Failed to load model "{model.key}". Error: {refusal.cause}'
        raise _Failure(error_answer(400, message, "model")) from None


# -- text


def _generate(
    memory: Memory, endpoint: str, body: JsonObject, knobs: Knobs
) -> Answer | EventStream:
    turns = _turns(endpoint, body)
    instance = _instance_for(memory, body, "llm")
    words = sum(len(text.split()) for _, text in turns)
    if words > instance.context_length:
        return json_answer({"error": _OVERFLOW})
    job = _job(instance, body, turns, words, knobs)
    plain, stream = FORMS[endpoint]
    if not body.get("stream"):
        return json_answer(plain(job), tokens=len(job.tokens), instance=instance)
    include_usage = bool((body.get("stream_options") or {}).get("include_usage"))
    events = stream(job, include_usage)
    events.instance = instance
    return events


def _job(
    instance: Instance, body: JsonObject, turns: list[tuple[str, str]], words: int, knobs: Knobs
) -> Job:
    asked = next((text for role, text in reversed(turns) if role == "user"), "")
    if tool := _tool_to_call(body, turns, asked):
        pieces = re.findall(r"\S+\s*", json.dumps(_arguments(tool[1])))
        return Job(instance.identifier, words, pieces, tool=tool[0])
    if knobs.has("big-answer"):
        return Job(instance.identifier, words, ["word " * (_BIG_ANSWER_BYTES // 5)])
    tokens, limit = _tokens(instance, asked), _token_limit(body)
    return Job(instance.identifier, words, tokens[:limit], cut=len(tokens) > (limit or len(tokens)))


def _turns(endpoint: str, body: JsonObject) -> list[tuple[str, str]]:
    """Return the conversation of any dialect as (role, text)."""
    name = {"completions": "prompt", "responses": "input"}.get(endpoint, "messages")
    if name not in body:
        raise _Failure(error_answer(400, f"'{name}' field is required", name))
    said = body[name]
    messages = said if isinstance(said, list) else [{"role": "user", "content": said}]
    system = body.get("instructions") or body.get("system")
    turns = [("system", _text(system))] if system else []
    for one in messages:
        whole = one if isinstance(one, dict) else {"role": "user", "content": one}
        role = str(whole.get("role") or whole.get("type"))
        turns.append((role, _text(whole.get("content", whole.get("output")))))
    return turns


def _text(content: Any) -> str:
    """Return the text of a content, which may be a string or a list of parts."""
    if isinstance(content, list):
        return " ".join(_text(part) for part in content)
    if isinstance(content, dict):
        return _text(content.get("text", content.get("content", "")))
    return content if isinstance(content, str) else ""


def _tokens(instance: Instance, asked: str) -> list[str]:
    """Return the answer, each token with the space behind it."""
    if count := re.search(r"count to (\d+)", asked):
        return [f"{number} " for number in range(1, int(count[1]) + 1)]
    text = (
        f"This is the LM Studio simulator speaking as {instance.model.display_name}. "
        f"There is no model behind it. Your message has {len(asked.split())} words."
    )
    return re.findall(r"\S+\s*", text)


def _token_limit(body: JsonObject) -> int | None:
    """Return the limit under any of its names; LM Studio takes -1 as none."""
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        limit = body.get(name)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def _tool_to_call(
    body: JsonObject, turns: list[tuple[str, str]], asked: str
) -> tuple[str, JsonObject] | None:
    """Return name and argument schema of the first tool, if it shall be called."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    if isinstance(choice, dict):  # Anthropic's {"type": "any"}, or a function by name
        choice = "none" if choice.get("type") in ("auto", "none") else "required"
    answered = bool(turns) and turns[-1][0] in ("tool", "function_call_output")
    wanted = choice == "required" or ("use the tool" in asked and not answered)
    if not tools or not wanted:
        return None
    tool = tools[0].get("function", tools[0])
    return str(tool.get("name")), tool.get("parameters") or tool.get("input_schema") or {}


def _arguments(schema: JsonObject) -> JsonObject:
    samples = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}
    properties = schema.get("properties") or {}
    return {name: samples.get(one.get("type"), "simulated") for name, one in properties.items()}


# -- embeddings


def _embed(memory: Memory, body: JsonObject) -> Answer:
    if "input" not in body:
        return error_answer(400, "'input' field is required", "input")
    instance = _instance_for(memory, body, "embedding")
    said = body["input"]
    texts = [str(one) for one in (said if isinstance(said, list) else [said])]
    words = sum(len(text.split()) for text in texts)
    as_base64 = body.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(text, as_base64)}
        for index, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": words, "total_tokens": words}
    content = {"object": "list", "data": data, "model": instance.identifier, "usage": usage}
    return json_answer(content, instance=instance)


def _vector(text: str, as_base64: bool) -> list[float] | str:
    """Return the text's vector: the same for the same text, as floats or little-endian float32."""
    digest = sha256(text.encode()).digest()[:_EMBEDDING_SIZE]
    vector = [byte / 255 - 0.5 for byte in digest]
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if as_base64 else vector
