"""Every path of the gateway with its operations, as OpenAPI objects."""

from __future__ import annotations

import re

from gateway.errors import dialect_of
from gateway.observe import TYPES
from gateway.openapi.shapes import Json
from gateway.proxy import ENDPOINTS, Endpoint
from gateway.request import DASHBOARD_PATHS, HEALTH_PATHS, is_admin_path

_ANY_KEY: list[Json] = [{"bearer": []}, {"apiKey": []}]
_ADMIN_KEY: list[Json] = [{"bearer": ["admin"]}, {"apiKey": ["admin"]}]

#: The shape of the error body of each dialect.
DIALECTS = {"admin": "AdminError", "openai": "OpenAIError", "anthropic": "AnthropicError"}
#: The meaning of each error status, and the headers of its response.
ERRORS: dict[int, tuple[str, tuple[str, ...]]] = {
    400: ("The request is invalid.", ()),
    401: ("The key is missing or wrong.", ("WWW-Authenticate",)),
    403: (
        "The address is not on the allowlist (`ip_not_allowed`), the key is not an admin key"
        " (`admin_key_required`), or, where no key is required, the request comes from a web page"
        " of another origin (`origin_not_allowed`) or names a foreign host (`host_not_allowed`).",
        (),
    ),
    404: ("The path, the model or the instance does not exist.", ()),
    408: ("The request body did not arrive in time.", ()),
    409: ("The request conflicts with the current state; do not retry it.", ("x-should-retry",)),
    413: ("The request body is larger than `MAX_BODY_BYTES`; under `/admin`, than 1 MiB.", ()),
    415: (
        "The body is not `application/json`, where no key is required (`unsupported_media_type`).",
        (),
    ),
    502: ("LM Studio rejected the request or closed the connection.", ()),
    503: ("LM Studio or the shared state is unavailable, or overloaded.", ("Retry-After",)),
    504: ("LM Studio did not respond in time.", ()),
}
_ACCESS_ERRORS = (401, 403)
_BODY_ERRORS = (400, 408, 413)
_RELAY_ERRORS = (*_BODY_ERRORS, 404, 502, 503, 504)


def json_of(shape: str) -> Json:
    """The content of a body with the given shape."""
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}


def headers(*names: str) -> Json:
    """The headers of a response: the named ones and X-Request-Id, which every response has."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-Id", *names)}


_ANYTHING: Json = {"*/*": {}}
_ANY_JSON: Json = {"application/json": {}}
_EVENTS: Json = {"text/event-stream": {"schema": {"type": "string"}}}
_TEXT: Json = {"text/plain": {"schema": {"type": "string"}}}

#: Paths that are only read: summary, content, and error statuses besides those of access control.
_VIEWS: dict[str, tuple[str, Json, tuple[int, ...]]] = {
    "/admin/models": (
        "List the loaded, downloaded and active models",
        json_of("Listing"),
        (502, 503),
    ),
    "/debug/": ("Open the dashboard", {"text/html": {}}, ()),
    "/debug/stream": ("Stream the events of all workers", _EVENTS, (400, 503)),
    "/debug/status": ("Show what is in flight and what ended last", json_of("Status"), (503,)),
    "/debug/metrics": ("Show counters and averages", json_of("Metrics"), (503,)),
    "/metrics": ("Counters, gauges and histograms for Prometheus", _TEXT, ()),
    "/health": ("Check LM Studio and the shared state", json_of("Health"), ()),
    "/health/ready": ("Check whether inference requests can be served", json_of("Ready"), ()),
    "/openapi.json": ("This document", _ANY_JSON, ()),
}
#: The operations on models, below ``/admin/models``, in the same form.
_MODEL_OPERATIONS: dict[str, tuple[str, Json, tuple[int, ...]]] = {
    "load": ("Load a model", json_of("Loaded") | _EVENTS, (404, 409, 502, 503)),
    "unload": ("Unload an instance of a model", json_of("Unloaded"), (404, 409, 502, 503)),
    "activate": ("Activate a model for requests that name none", json_of("Activated"), (503,)),
    "deactivate": ("Deactivate the active model", json_of("Deactivated"), (503,)),
}
#: Paths below ``/v1`` that have a shorthand.
_INFERENCE = {
    "/chat/completions": "Complete a chat",
    "/completions": "Complete a text",
    "/embeddings": "Embed texts",
    "/responses": "Create a response (OpenAI's Responses API)",
    "/messages": "Create a message (Anthropic's Messages API)",
    "/images/generations": "Generate images",
    "/audio/transcriptions": "Transcribe speech",
    "/audio/translations": "Translate speech",
    "/models": "List the models of LM Studio",
    "/models/{path}": "Show a model of LM Studio",
}
_RELAYED = {
    "/v1/{path}": "Any other path of LM Studio's `/v1`, with any method",
    "/api/{path}": "LM Studio's native REST API, with any method",
}
_RELAYED_METHODS = ("get", "post", "put", "patch", "delete")

_LOAD_STREAM = """\
With `Accept: text/event-stream` the response streams `model_load_progress` events (`progress`
0-100, `progressRaw` 0-1), then `model_load_complete` with the members of the plain response, or
`error` with `error`, `status`, `requestId` and optionally `details`. The load is cancelled if the
client disconnects."""
_STREAM = """\
Each event has an id, a type and one line of JSON with a `timestamp`. `Last-Event-ID` or
`lastEventId` resumes without loss while the log still holds the following events; otherwise a `gap`
event reports how many were `missed`."""
_LAST_ID: Json = {"schema": {"type": "integer"}, "description": "The id of the last event read."}
_TYPES: Json = {"type": "array", "items": {"enum": list(TYPES)}}
_REST: Json = {"schema": {"type": "string"}, "description": "The rest of the path, with slashes."}

#: Additional members of some operations.
_ADDITIONS: dict[str, Json] = {
    "/admin/models/load": {"description": _LOAD_STREAM},
    "/debug/stream": {
        "description": _STREAM,
        "parameters": [
            {"name": "Last-Event-ID", "in": "header", **_LAST_ID},
            {"name": "lastEventId", "in": "query", **_LAST_ID},
            {"name": "types", "in": "query", "explode": False, "schema": _TYPES},
        ],
    },
    "/health": {"description": "Needs a key of any role if `REQUIRE_AUTH_FOR_HEALTH` is true."},
}
#: The types of injected values by their name in ``defaultInference``; ``stopStrings`` has several.
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
    not_ready = {"description": "LM Studio is unavailable.", "headers": headers("Retry-After")}
    found["/health/ready"]["get"]["responses"]["503"] = not_ready | {"content": json_of("Ready")}
    for verb, (summary, content, errors) in _MODEL_OPERATIONS.items():
        path = f"/admin/models/{verb}"
        operation = _operation("post", path, summary, content, (*_BODY_ERRORS, 415, *errors))
        body = {"required": verb != "deactivate", "content": json_of(verb.capitalize())}
        found[path] = {"post": operation | {"requestBody": body}}
    for path, summary in _INFERENCE.items():
        method = "get" if path.startswith("/models") else "post"
        found[f"/v1{path}"] = {method: _relayed(method, f"/v1{path}", summary)}
        found[path] = {method: _relayed(method, path, f"{summary} (shorthand for `/v1{path}`)")}
    for path, summary in _RELAYED.items():
        found[path] = {method: _relayed(method, path, summary) for method in _RELAYED_METHODS}
    return found


def _operation(
    method: str, path: str, summary: str, content: Json, errors: tuple[int, ...]
) -> Json:
    """An operation with the error responses of its path's dialect."""
    shape = DIALECTS[dialect_of(path)]
    responses: Json = {"200": {"description": "Success.", "headers": headers(), "content": content}}
    for status in sorted((*_ACCESS_ERRORS, *errors)):
        responses[str(status)] = {"$ref": f"#/components/responses/{shape}{status}"}
    responses["default"] = {"$ref": f"#/components/responses/{shape}"}
    return {
        "operationId": re.sub(r"\W+", "_", f"{method}{path}").rstrip("_"),
        "summary": summary,
        "security": _security(path),
        "responses": responses,
        **_ADDITIONS.get(path, {}),
    }


def _security(path: str) -> list[Json]:
    if path in DASHBOARD_PATHS:
        return []
    if is_admin_path(path):
        return _ADMIN_KEY
    return [{}, *_ANY_KEY] if path in HEALTH_PATHS else _ANY_KEY


def _relayed(method: str, path: str, summary: str) -> Json:
    """An operation that is relayed to LM Studio."""
    endpoint = ENDPOINTS.get("/v1" + path.removeprefix("/v1"))
    content = _ANYTHING
    additions: Json = {}
    if endpoint is not None:
        content = _ANY_JSON | (_EVENTS if "stream" in endpoint.members else {})
        schema = {"type": "object", "properties": _known_members(endpoint)}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        additions = {"requestBody": body}
    elif method in ("post", "put", "patch"):
        additions = {"requestBody": {"content": _ANYTHING}}
    if path.endswith("{path}"):
        additions["parameters"] = [{"name": "path", "in": "path", "required": True, **_REST}]
    return _operation(method, path, summary, content, _RELAY_ERRORS) | additions


def _known_members(endpoint: Endpoint) -> Json:
    """The members of a request body that the gateway reads or adds."""
    text = "Defaults to the active model if absent, null or empty."
    members: Json = {"model": {"type": ["string", "null"], "description": text}}
    for name, member in endpoint.members.items():
        kind = _INJECTED_TYPES.get(name)
        text = f"Defaults to `{name}` of the active model's `defaultInference`."
        members[member] = {"description": text} | ({"type": [kind, "null"]} if kind else {})
    if endpoint.usage_on_request:
        text = (
            "The gateway always requests usage from LM Studio, but relays it only to clients that"
            " ask for it here."
        )
        members["stream_options"] = {"description": text}
    return members
