"""Assembles the OpenAPI document and adds what all operations share."""

from __future__ import annotations

from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin

from gateway import __version__
from gateway.admin import schemas
from gateway.openapi.operations import DIALECTS, ERRORS, headers, json_of, paths
from gateway.openapi.shapes import SHAPES, Json

VERSION = "3.1.0"

_DESCRIPTION = """\
A gateway in front of LM Studio. Clients send a key as `Authorization: Bearer KEY` or
`X-API-Key: KEY`; a gateway without keys needs none. If admin keys are set, operations with the role
`admin` need one of them. Every response has an `X-Request-Id`, which is that of the request if it
is valid. Error bodies follow OpenAI for `/v1`, its shorthand and `/api`, Anthropic for
`/v1/messages`, and are `{"error", "details", "requestId"}` everywhere else. The bodies of inference
requests and responses are those of LM Studio and pass through unchanged: this document only
describes the members that the gateway reads or adds."""

_ADMIN_BODIES = {
    "Load": schemas.LoadSchema,
    "Unload": schemas.UnloadSchema,
    "Activate": schemas.ActivateSchema,
    "Deactivate": schemas.DeactivateSchema,
}

_HEADERS: dict[str, Json] = {
    "X-Request-Id": {"required": True, "schema": {"type": "string"}},
    "WWW-Authenticate": {"schema": {"const": "Bearer"}},
    "x-should-retry": {"schema": {"const": "false"}, "description": "Read by OpenAI's SDKs."},
    "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."},
}


def document() -> Json:
    """The OpenAPI document, ready to be serialized."""
    return {
        "openapi": VERSION,
        "info": {
            "title": "lmstudio-gateway",
            "version": __version__,
            "description": _DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "paths": paths(),
        "components": {
            "schemas": _admin_bodies() | SHAPES,
            "responses": _error_responses(),
            "headers": _HEADERS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def _admin_bodies() -> dict[str, Json]:
    """The request bodies of ``/admin`` and their parts, from the schemas that validate them."""
    spec = APISpec("", "", VERSION, plugins=[MarshmallowPlugin()])
    for name, schema in _ADMIN_BODIES.items():
        spec.components.schema(name, schema=schema)
    bodies: dict[str, Json] = spec.components.schemas
    for body in bodies.values():
        body["additionalProperties"] = False
    bodies["Unload"]["anyOf"] = [{"required": ["modelKey"]}, {"required": ["instanceId"]}]
    return bodies


def _error_responses() -> dict[str, Json]:
    """A response for each status in each dialect, and one per dialect for all other statuses."""
    responses: dict[str, Json] = {}
    for shape in DIALECTS.values():
        content = {"content": json_of(shape)}
        for status, (description, names) in ERRORS.items():
            response = {"description": description, "headers": headers(*names)}
            responses[f"{shape}{status}"] = response | content
        other = {"description": "Any other error, or one from LM Studio.", "headers": headers()}
        responses[shape] = other | content
    return responses
