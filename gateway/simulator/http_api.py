"""LM Studio's HTTP API: its endpoints, the model that a request means, and what it generates."""

from __future__ import annotations

import json
import re
import struct
import time
from collections import deque
from email.message import Message
from hashlib import sha256
from typing import Any, NamedTuple
from urllib.parse import unquote

import gevent

from gateway.simulator import dialects
from gateway.simulator.dialects import Output
from gateway.simulator.models import MODELS, Instance, JsonObject, Refusal
from gateway.simulator.response import Response, encoded, error_response
from gateway.simulator.state import Simulator

_OVERFLOW = "The number of tokens to keep from the prompt is greater than the context length."
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_SAMPLES: JsonObject = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}
#: Endpoint below ``/v1/`` → the field that holds the prompt.
_FIELDS = {
    "chat/completions": "messages", "completions": "prompt", "responses": "input",
    "messages": "messages", "embeddings": "input",
}  # fmt: skip


class Request(NamedTuple):
    """One request of LM Studio's API."""

    method: str
    target: str  #: path and query
    headers: Message
    body: bytes
    faults: set[str]  #: see :mod:`gateway.simulator.server`
    pace: float  #: seconds between two tokens


def respond(simulator: Simulator, request: Request) -> Response:
    """Answer one request, in real time."""
    method, path = request.method, request.target.partition("?")[0]
    if path == "/lmstudio-greeting":
        return Response({"lmstudio": True})
    if simulator.token and request.headers.get("Authorization") != f"Bearer {simulator.token}":
        message = "Malformed or missing API token. Provide it as: Authorization: Bearer sk-lm-…"
        return error_response(401, message, type="invalid_request", code="invalid_api_key")
    instances = list(simulator.memory.instances.values())
    same = {"object": "model", "owned_by": "organization_owner", "created": 0}
    names = [*MODELS, *(one.identifier for one in instances)]
    models = {name: {"id": name, **same} for name in names}
    match "GET" if method == "HEAD" else method, path.removeprefix("/v1/"):
        case "GET", "models":
            return Response({"object": "list", "data": list(models.values())})
        case "GET", endpoint if endpoint.startswith("models/"):
            name = unquote(endpoint.removeprefix("models/"))
            unknown = error_response(
                404, f'Model "{name}" not found', "model", code="model_not_found"
            )
            return Response(models[name]) if name in models else unknown
        case "GET", "/api/v0/models" | "/api/v1/models":
            listed = [_native(model, instances) for model in MODELS.values()]
            return Response({"object": "list", "data": listed, "models": listed})
        case "POST", endpoint if endpoint in _FIELDS:
            return _infer(simulator, request, endpoint)
    return Response({"error": f"Unexpected endpoint or method. ({method} {path})"})


def _native(model: JsonObject, instances: list[Instance]) -> JsonObject:
    """Return an entry of ``/api/v0/models`` and ``/api/v1/models``, with the names of both."""
    key, entry = model["modelKey"], {"arch": model["architecture"]}
    loaded = [{"id": one.identifier} for one in instances if one.modelKey == key]
    entry |= {re.sub("([A-Z])", r"_\1", name).lower(): model[name] for name in model}
    entry |= {"id": key, "key": key, "compatibility_type": model["format"]}
    return entry | {"state": "loaded" if loaded else "not-loaded", "loaded_instances": loaded}


def _infer(simulator: Simulator, request: Request, endpoint: str) -> Response:
    """Answer a request that takes a model: with vectors, a stream or a whole text."""
    try:
        body = dict(json.loads(request.body))
    except (ValueError, TypeError, RecursionError) as problem:
        return error_response(400, f"The body must be a JSON object: {problem}")
    if (field := _FIELDS[endpoint]) not in body:
        return error_response(400, f"'{field}' field is required", field)
    inputs = body[field] if isinstance(body[field], list) else [body[field]]
    namespace = "embedding" if endpoint == "embeddings" else "llm"
    instance = _instance(simulator, str(body.get("model") or ""), namespace)
    if isinstance(instance, Response):
        return instance
    instance.lastUsedTime = int(time.time() * 1000)
    if endpoint == "embeddings":
        return _embed(instance, [str(one) for one in inputs], body.get("encoding_format"))
    try:
        output = _generate(instance, body, inputs)
    except (TypeError, AttributeError, LookupError, RecursionError) as problem:
        return error_response(400, f"Invalid request: {problem}")
    if output.prompt > instance.contextLength:
        return Response({"error": _OVERFLOW})
    if "big-answer" in request.faults:
        output = output._replace(tokens=["word " * (1 << 20)])
    if endpoint in ("responses", "messages"):
        dialect = dialects.responses if endpoint == "responses" else dialects.messages
        reply = dialect(output)
    else:
        options = body.get("stream_options")
        with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        reply = dialects.openai(output, endpoint == "chat/completions", with_usage)
    seconds = len(output.tokens) * request.pace
    instance.lastUsedTime += int(seconds * 1000)
    if body.get("stream"):
        return Response(reply, Cache_Control="no-cache", Connection="keep-alive")
    gevent.sleep(seconds)
    return Response(reply[0])


def _instance(simulator: Simulator, name: str, namespace: str) -> Instance | Response:
    """Find the loaded instance that a request means, or load a downloaded model for it."""
    loaded = simulator.memory.of(namespace)
    if not name and len(loaded) != 1:
        return error_response(
            400, "No models loaded. Load one with the `lms load` command.", "model"
        )
    named = [one for one in loaded if one.identifier == name or not name]
    if fitting := named or [one for one in loaded if one.modelKey == name]:
        return fitting[0]
    if name not in MODELS and name not in simulator.memory.instances:
        hint = f'Invalid model identifier "{name}". Please specify a valid downloaded model.'
        return error_response(400, hint, "model", code="model_not_found")
    new, failure = Instance(namespace, name, ttlMs=3_600_000), simulator.switches.fail_loads
    try:
        deque(simulator.memory.load(new, failure, 0.05), 0)  # just in time
    except Refusal as refusal:
        cause = refusal.error.get("cause", refusal)
        return error_response(400, f'Failed to load model "{name}". Error: {cause}', "model")
    return new


def _text(content: Any) -> str:
    """Return the text of a content, which may be a string or a list of parts."""
    match content:
        case list():
            return " ".join(map(_text, content))
        case {"text": inner} | {"content": inner} | {"output": inner}:
            return _text(inner)
    return content if isinstance(content, str) else ""


def _generate(instance: Instance, body: JsonObject, inputs: list[Any]) -> Output:
    """Generate a call of the first tool, a count, or a text that says who is speaking."""
    turns = [one if isinstance(one, dict) else {"role": "user", "content": one} for one in inputs]
    prompt = next((_text(one) for one in reversed(turns) if one.get("role") == "user"), "")
    texts = [*map(_text, turns), _text(body.get("instructions") or body.get("system"))]
    output = Output(instance.identifier, sum(len(text.split()) for text in texts), [])
    tools, choice, last = body.get("tools"), body.get("tool_choice"), turns[-1] if turns else {}
    if isinstance(choice, dict):  # Anthropic's {"type": "any"}, or a function by name
        choice = "none" if choice.get("type") in ("auto", "none") else "required"
    answered = last.get("role") == "tool" or last.get("type") == "function_call_output"
    if tools and (choice == "required" or ("use the tool" in prompt and not answered)):
        tool = tools[0].get("function", tools[0])
        schema = tool.get("parameters") or tool.get("input_schema") or {}
        types = {name: one.get("type") for name, one in (schema.get("properties") or {}).items()}
        arguments = json.dumps({name: _SAMPLES.get(types[name], "simulated") for name in types})
        return output._replace(tokens=re.findall(r"\S+\s*", arguments), tool=str(tool.get("name")))
    text = (
        f"This is the LM Studio simulator speaking as {MODELS[instance.modelKey]['displayName']}. "
        f"There is no model behind it. Your message has {len(prompt.split())} words."
    )
    if number := re.search(r"count to (\d+)", prompt):
        text = "".join(f"{one} " for one in range(1, int(number[1]) + 1))
    tokens = re.findall(r"\S+\s*", text)
    limits = [body[name] for name in _LIMITS if isinstance(body.get(name), int) and body[name] > 0]
    limit = min([*limits, len(tokens)])
    return output._replace(tokens=tokens[:limit], cut=limit < len(tokens))


def _embed(instance: Instance, texts: list[str], encoding: Any) -> Response:
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
    return Response({"object": "list", "data": data, "model": model, "usage": usage})
