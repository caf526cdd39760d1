"""The blueprint of ``/openapi.json``."""

from __future__ import annotations

from functools import cache

from flask import Blueprint, Response

from gateway.errors import dumps

blueprint = Blueprint("openapi", __name__)


@blueprint.get("/openapi.json")
def describe() -> Response:
    """The document; the same for every gateway of a version."""
    return Response(_document(), content_type="application/json")


@cache
def _document() -> bytes:
    # apispec is heavy: a gateway whose description nobody reads does not import it
    from gateway.openapi.document import document

    return dumps(document())
