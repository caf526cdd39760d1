"""Every path of the gateway with its operations, in OpenAPI's form."""

from __future__ import annotations

import re

from gateway.errors import dialect_of
from gateway.observe import TYPES
from gateway.openapi.shapes import Json
from gateway.proxy import ENDPOINTS, Endpoint
from gateway.request import DASHBOARD_PATHS, HEALTH_PATHS, is_admin_path

_ANY_KEY: list[Json] = [{"bearer": []}, {"apiKey": []}]
_ADMIN_KEY: list[Json] = [{"bearer": ["admin"]}, {"apiKey": ["admin"]}]

#: The shape of each dialect's errors.
DIALECTS = {"admin": "AdminError", "openai": "OpenAIError", "anthropic": "AnthropicError"}
#: What each status means, and the headers that come with it.
ERRORS: dict[int, tuple[str, tuple[str, ...]]] = {
    400: ("The request is not valid.", ()),
    401: ("There is no key, or it is wrong.", ("WWW-Authenticate",)),
    403: ("The address is not on the allowlist, or the key is no admin key.", ()),
    404: ("There is no such thing.", ()),
    408: ("The body did not come in time.", ()),
    409: ("It can't be done as things are; trying again is in vain.", ("x-should-retry",)),
    413: ("The body is larger than `MAX_BODY_BYTES`.", ()),
    502: ("LM Studio refused, or broke the exchange off.", ()),
    503: ("LM Studio or the shared state can't be reached, or too much runs.", ("Retry-After",)),
    504: ("LM Studio did not answer in time.", ()),
}
_ACCESS_ERRORS = (401, 403)
_BODY_ERRORS = (400, 408, 413)
_RELAY_ERRORS = (*_BODY_ERRORS, 404, 502, 503, 504)


def json_of(shape: str) -> Json:
    """Content that is JSON of a shape."""
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}


def headers(*names: str) -> Json:
    """The headers of an answer: these, and the one that all have."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-Id", *names)}


_ANYTHING: Json = {"*/*": {}}
_ANY_JSON: Json = {"application/json": {}}
_EVENTS: Json = {"text/event-stream": {"schema": {"type": "string"}}}
_TEXT: Json = {"text/plain": {"schema": {"type": "string"}}}

#: What can be read: summary, content, errors beside those of access.
_VIEWS: dict[str, tuple[str, Json, tuple[int, ...]]] = {
    "/admin/models": ("What is loaded, downloaded and active", json_of("Listing"), (502, 503)),
    "/debug/": ("The dashboard", {"text/html": {}}, ()),
    "/debug/stream": ("Every event of every worker", _EVENTS, (400, 503)),
    "/debug/status": ("What runs now and what ran last", json_of("Status"), (503,)),
    "/debug/metrics": ("Counters and averages", json_of("Metrics"), (503,)),
    "/metrics": ("Counters, gauges and histograms for Prometheus", _TEXT, ()),
    "/health": ("Whether gateway, LM Studio and shared state are well", json_of("Health"), ()),
    "/health/ready": ("Whether a request could be served now", json_of("Ready"), ()),
    "/openapi.json": ("This document", _ANY_JSON, ()),
}
#: What can be done with models, in the same form.
_COMMANDS: dict[str, tuple[str, Json, tuple[int, ...]]] = {
    "load": ("Load a model", json_of("Loaded") | _EVENTS, (404, 409, 502, 503)),
    "unload": ("Unload an instance of a model", json_of("Unloaded"), (404, 409, 502, 503)),
    "activate": ("Choose the model that is injected", json_of("Activated"), (503,)),
    "deactivate": ("Inject no model", json_of("Deactivated"), (503,)),
}
#: Paths behind ``/v1`` that have a shorthand.
_INFERENCE = {
    "/chat/completions": "Complete a chat",
    "/completions": "Complete a text",
    "/embeddings": "Embed texts",
    "/responses": "OpenAI's Responses API",
    "/messages": "Anthropic's Messages API",
    "/images/generations": "Generate images",
    "/audio/transcriptions": "Transcribe speech",
    "/audio/translations": "Translate speech",
    "/models": "The models that LM Studio offers",
    "/models/{path}": "One model",
}
_RELAYED = {
    "/v1/{path}": "Anything else of LM Studio's `/v1`, by any method",
    "/api/{path}": "LM Studio's native REST, by any method",
}
_RELAYED_METHODS = ("get", "post", "put", "patch", "delete")

_LOADING = """\
With `Accept: text/event-stream` the answer's events are `model_load_progress` (`progress` 0-100,
`progressRaw` 0-1), then `model_load_complete` with the members of the plain answer, or `error` with
`error`, `status`, `requestId` and perhaps `details`. A client that leaves cancels the load."""
_STREAM = """\
Each event has an id, a type and one line of JSON with a `timestamp`. `Last-Event-ID` or
`lastEventId` resumes without loss while the log holds what is missing, else the event `gap` tells
how many were `missed`."""
_LAST_ID: Json = {"schema": {"type": "integer"}, "description": "The last event that you have."}
_TYPES: Json = {"type": "array", "items": {"enum": list(TYPES)}}
_REST: Json = {"schema": {"type": "string"}, "description": "What follows; it may have slashes."}

#: What some operations have besides.
_BESIDES: dict[str, Json] = {
    "/admin/models/load": {"description": _LOADING},
    "/debug/stream": {
        "description": _STREAM,
        "parameters": [
            {"name": "Last-Event-ID", "in": "header", **_LAST_ID},
            {"name": "lastEventId", "in": "query", **_LAST_ID},
            {"name": "types", "in": "query", "explode": False, "schema": _TYPES},
        ],
    },
    "/health": {"description": "Any key is needed with `REQUIRE_AUTH_FOR_HEALTH`."},
}
#: Types of what is injected, by its name in ``defaultInference``; ``stopStrings`` has several.
_INJECTED_TYPES = {
    "temperature": "number",
    "maxTokens": "integer",
    "topP": "number",
    "topK": "integer",
    "repeatPenalty": "number",
    "stream": "boolean",
}


def paths() -> Json:
    """All paths, each with its operations by method."""
    found = {path: {"get": _operation("get", path, *row)} for path, row in _VIEWS.items()}
    not_ready = {"description": "Not now.", "headers": headers("Retry-After")}
    found["/health/ready"]["get"]["responses"]["503"] = not_ready | {"content": json_of("Ready")}
    for verb, (summary, content, errors) in _COMMANDS.items():
        path = f"/admin/models/{verb}"
        operation = _operation("post", path, summary, content, (*_BODY_ERRORS, *errors))
        body = {"required": verb != "deactivate", "content": json_of(verb.capitalize())}
        found[path] = {"post": operation | {"requestBody": body}}
    for path, summary in _INFERENCE.items():
        method = "get" if path.startswith("/models") else "post"
        found[f"/v1{path}"] = {method: _relayed(method, f"/v1{path}", summary)}
        found[path] = {method: _relayed(method, path, f"{summary} (short for `/v1{path}`)")}
    for path, summary in _RELAYED.items():
        found[path] = {method: _relayed(method, path, summary) for method in _RELAYED_METHODS}
    return found


def _operation(
    method: str, path: str, summary: str, content: Json, errors: tuple[int, ...]
) -> Json:
    """An operation whose errors are in the dialect of its path."""
    shape = DIALECTS[dialect_of(path)]
    responses: Json = {"200": {"description": "Done.", "headers": headers(), "content": content}}
    for status in sorted((*_ACCESS_ERRORS, *errors)):
        responses[str(status)] = {"$ref": f"#/components/responses/{shape}{status}"}
    responses["default"] = {"$ref": f"#/components/responses/{shape}"}
    return {
        "operationId": re.sub(r"\W+", "_", f"{method}{path}").rstrip("_"),
        "summary": summary,
        "security": _security(path),
        "responses": responses,
        **_BESIDES.get(path, {}),
    }


def _security(path: str) -> list[Json]:
    if path in DASHBOARD_PATHS:
        return []
    if is_admin_path(path):
        return _ADMIN_KEY
    return [{}, *_ANY_KEY] if path in HEALTH_PATHS else _ANY_KEY


def _relayed(method: str, path: str, summary: str) -> Json:
    """An operation that LM Studio answers."""
    endpoint = ENDPOINTS.get("/v1" + path.removeprefix("/v1"))
    content = _ANYTHING
    besides: Json = {}
    if endpoint is not None:
        content = _ANY_JSON | (_EVENTS if "stream" in endpoint.members else {})
        schema = {"type": "object", "properties": _looked_at(endpoint)}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        besides = {"requestBody": body}
    elif method in ("post", "put", "patch"):
        besides = {"requestBody": {"content": _ANYTHING}}
    if path.endswith("{path}"):
        besides["parameters"] = [{"name": "path", "in": "path", "required": True, **_REST}]
    return _operation(method, path, summary, content, _RELAY_ERRORS) | besides


def _looked_at(endpoint: Endpoint) -> Json:
    """The members of a body that the gateway reads or adds."""
    words = "Absent, null or empty: the active model."
    members: Json = {"model": {"type": ["string", "null"], "description": words}}
    for name, member in endpoint.members.items():
        kind = _INJECTED_TYPES.get(name)
        words = f"Absent: `{name}` of the active model's `defaultInference`."
        members[member] = {"description": words} | ({"type": [kind, "null"]} if kind else {})
    if endpoint.usage_on_request:
        words = "The gateway always asks for usage; it tells it to whoever asks here."
        members["stream_options"] = {"description": words}
    return members
