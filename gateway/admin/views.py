"""The blueprint of ``/admin``: validates each body and lets :mod:`.models` do the work."""

from __future__ import annotations

import codecs
import secrets
from typing import Any

from flask import Blueprint, Response, current_app, request

from gateway import sse
from gateway.admin import schemas
from gateway.admin.models import Emit, Models
from gateway.admin.operation import Operation
from gateway.errors import BadRequest, loads
from gateway.request import REQUEST_ID, bodies

#: Bytes of a body, at most.
MAX_BODY_BYTES = 1 << 20

blueprint = Blueprint("admin", __name__, url_prefix="/admin")


@blueprint.get("/models")
def list_models() -> dict[str, Any]:
    return _models().listing()


@blueprint.post("/models/load")
def load() -> Response:
    """Load a model; respond with JSON at its end, or with a stream of its events."""
    wanted = schemas.parse(schemas.LoadSchema(), _body())
    models, publish = _models(), _publisher()
    operation = Operation(
        request.environ,
        lambda emit: models.load(wanted, emit),
        lambda result: models.undo_load(result, publish),
        publish,
        current_app.extensions["gateway"].operations,
    )
    if _wants_events():
        return Response(operation.events(), content_type=sse.CONTENT_TYPE, headers=sse.UNBUFFERED)
    body = operation.result()
    headers = {"Content-Length": str(body.length)}
    return Response(body, content_type="application/json", headers=headers)


@blueprint.post("/models/unload")
def unload() -> dict[str, Any]:
    return _models().unload(schemas.parse(schemas.UnloadSchema(), _body()), _publisher())


@blueprint.post("/models/activate")
def activate() -> dict[str, Any]:
    return _models().activate(schemas.parse(schemas.ActivateSchema(), _body()), _publisher())


@blueprint.post("/models/deactivate")
def deactivate() -> dict[str, Any]:
    schemas.parse(schemas.DeactivateSchema(), _body(optional=True))
    return _models().deactivate(_publisher())


def parse_body(content: bytes) -> Any:
    """Parse the JSON of a body; BadRequest (``invalid_json``) if it is malformed."""
    fault = ""
    if content.startswith(codecs.BOM_UTF8):
        fault = ": it begins with a byte-order mark (U+FEFF)"
    else:
        try:
            return loads(content.decode())
        except RecursionError:
            fault = ": it is nested too deeply"
        except ValueError:  # also for a number with too many digits
            pass
    raise BadRequest(f"The body is not valid JSON{fault}.", code="invalid_json")


def _models() -> Models:
    models: Models = current_app.extensions["gateway"].models
    return models


def _publisher() -> Emit:
    """A function that publishes and counts the events of the current request's operation."""
    parts = current_app.extensions["gateway"]
    request_id = request.environ[REQUEST_ID]
    operation = secrets.token_hex(8)

    def publish(event: str, data: dict[str, Any]) -> None:
        if event == "error":
            data = {"requestId": request_id, **data}
        loading = event.startswith("model_load") or data.get("operation") == "model_load"
        if loading and event in ("model_load_complete", "error"):
            parts.metrics.load_ended("loaded" if event == "model_load_complete" else "failed")
        parts.events.publish(event, data, operation if loading else "")

    return publish


def _body(*, optional: bool = False) -> Any:
    allowed = current_app.extensions["gateway"].settings.max_body_bytes
    content = bodies.read_body(request.environ, min(allowed, MAX_BODY_BYTES))
    if optional and not content.strip():
        return {}
    return parse_body(content)


def _wants_events() -> bool:
    return "text/event-stream" in request.environ.get("HTTP_ACCEPT", "").lower()
