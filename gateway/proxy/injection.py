"""The injection table: which fields each endpoint's requests get when the client left them out.

A field is added only if the body does not contain it; ``model`` also if it is null or empty.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from gateway.errors import BadRequest
from gateway.proxy.members import Members
from gateway.state import Active


@dataclass(frozen=True)
class Endpoint:
    """One row of the table."""

    #: Name in ``defaultInference`` → member of the request body.
    members: dict[str, str]
    #: Whether only an active embedding model may be injected.
    embeddings: bool = False
    #: Whether streams report usage only if ``stream_options`` asks for it.
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

#: The endpoints whose requests get a model and parameters, by path.
ENDPOINTS: dict[str, Endpoint] = {
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

#: Member → another name for it: nothing is injected where the client used the other name.
_ALTERNATIVES = {"max_tokens": "max_completion_tokens"}

NO_ACTIVE_MODEL = (
    "The request names no model and none is active. Name one, or activate one: "
    'POST /admin/models/activate {"modelKey": "…"} or POST /admin/models/load.'
)


@dataclass(frozen=True)
class Prepared:
    """A body that is ready to be sent upstream, and what the relay needs to know about it."""

    body: bytes
    #: The model that the client named; None if it named none.
    requested_model: str | None
    #: The model that is sent upstream.
    model: str
    stream: bool
    #: Whether the gateway, not the client, asked for the stream's usage chunk.
    added_usage: bool


def prepare(endpoint: Endpoint, body: bytes, active: Callable[[], Active | None]) -> Prepared:
    """Inject into a JSON body the fields that the client left out.

    Raises BadRequest: ``invalid_json`` if the body is not a JSON object in UTF-8,
    ``no_active_model`` if it names no model and none can be injected.
    """
    members = Members(body)
    requested = members.values.get("model")
    inject: dict[str, str] = {}
    current = active()
    model = requested
    if requested is None or requested == "":
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
                and _ALTERNATIVES.get(member) not in members.values
            ):
                inject[member] = text
    streams = members.values.get("stream") is True or inject.get("stream") == "true"
    added_usage = streams and endpoint.usage_on_request and _ask_for_usage(members, inject)
    return Prepared(
        members.with_injected(inject),
        requested if isinstance(requested, str) else None,
        model if isinstance(model, str) else "",
        streams,
        added_usage,
    )


def _ask_for_usage(members: Members, inject: dict[str, str]) -> bool:
    """Add a request for the usage chunk unless the client asked for it; returns whether it did."""
    options = members.values.get("stream_options")
    if options is None:
        inject["stream_options"] = '{"include_usage":true}'
        return True
    if not isinstance(options, dict) or options.get("include_usage") is True:
        return False
    raw = members.raw("stream_options").encode()
    inject["stream_options"] = Members(raw).with_injected({"include_usage": "true"}).decode()
    return True
