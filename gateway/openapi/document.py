"""The OpenAPI document: what all operations share, and the schemas of the bodies of ``/admin``."""

from __future__ import annotations

from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin

from gateway import __version__
from gateway.admin import schemas
from gateway.openapi.operations import DIALECTS, ERRORS, headers, json_of, paths
from gateway.openapi.shapes import SHAPES, Json

VERSION = "3.1.0"

_ABOUT = """\
A gateway in front of LM Studio. A key comes as `Authorization: Bearer KEY` or `X-API-Key: KEY`; a
gateway that has none set needs none. Where admin keys are set, operations of the role `admin` need
one of them. Every answer has an `X-Request-Id`; a sane one of the request is kept. Errors of `/v1`,
of its shorthand and of `/api` are OpenAI's, those of `/v1/messages` Anthropic's, all others
`{"error", "details", "requestId"}`. The bodies of inference are LM Studio's and pass unchanged:
only what the gateway looks at or adds is described."""

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
    """The description of this gateway, ready for JSON."""
    return {
        "openapi": VERSION,
        "info": {
            "title": "lmstudio-gateway",
            "version": __version__,
            "description": _ABOUT,
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
    """The bodies of ``/admin`` and what is nested in them, from the schemas that check them."""
    spec = APISpec("", "", VERSION, plugins=[MarshmallowPlugin()])
    for name, schema in _ADMIN_BODIES.items():
        spec.components.schema(name, schema=schema)
    bodies: dict[str, Json] = spec.components.schemas
    for body in bodies.values():
        body["additionalProperties"] = False
    bodies["Unload"]["anyOf"] = [{"required": ["modelKey"]}, {"required": ["instanceId"]}]
    return bodies


def _error_responses() -> dict[str, Json]:
    """A response for every status in every dialect, and one for statuses that are not listed."""
    responses: dict[str, Json] = {}
    for shape in DIALECTS.values():
        for status, (words, names) in ERRORS.items():
            told = {"headers": headers(*names), "content": json_of(shape)}
            responses[f"{shape}{status}"] = {"description": words, **told}
        told = {"headers": headers(), "content": json_of(shape)}
        responses[shape] = {"description": "Another error, or LM Studio's own.", **told}
    return responses
