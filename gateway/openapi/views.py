"""The blueprint of ``/openapi.json``."""

from __future__ import annotations

from functools import cache

from flask import Blueprint, Response

from gateway.errors import dumps

blueprint = Blueprint("openapi", __name__)


@blueprint.get("/openapi.json")
def describe() -> Response:
    """The document, which is the same for every gateway of a version."""
    return Response(_document(), content_type="application/json")


@cache
def _document() -> bytes:
    # apispec is slow to import, and most gateways never serve this document
    from gateway.openapi.document import document

    return dumps(document())
