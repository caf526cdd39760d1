"""The injection table of the contract (§4): what is added to a request that lacks it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from gateway.errors import BadRequest
from gateway.proxy.members import Members
from gateway.state import Active


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
