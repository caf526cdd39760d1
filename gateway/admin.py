"""The admin surface: parse, let :mod:`gateway.models` do it, answer."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
from flask import Blueprint, Response, current_app, request
from gevent.queue import Queue

from gateway import cancellation, schemas
from gateway.access import REQUEST_ID
from gateway.bodies import read_body
from gateway.errors import BadRequest, GatewayError, dumps
from gateway.events import timestamp
from gateway.models import Emit, Models
from gateway.proxy import ClientGone
from gateway.relay import HEARTBEAT
from gateway.sse import KEEP_ALIVE

blueprint = Blueprint("admin", __name__, url_prefix="/admin")

Event = tuple[str, dict[str, Any]]


@blueprint.get("/models")
def list_models() -> Response:
    return _json(_models().listing())


@blueprint.post("/models/load")
def load() -> Response:
    """Load a model: plain JSON at the end, or its events while it loads."""
    wanted = schemas.parse(schemas.LoadSchema(), _body())
    models = _models()
    publish = _publisher()
    operation = Operation(lambda emit: models.load(wanted, emit), publish)
    if _wants_events():
        return _event_stream(operation.events(request.environ, request.environ[REQUEST_ID]))
    return _json(operation.result(request.environ))


@blueprint.post("/models/unload")
def unload() -> Response:
    return _json(_models().unload(schemas.parse(schemas.UnloadSchema(), _body()), _publisher()))


@blueprint.post("/models/activate")
def activate() -> Response:
    return _json(_models().activate(schemas.parse(schemas.ActivateSchema(), _body()), _publisher()))


@blueprint.post("/models/deactivate")
def deactivate() -> Response:
    schemas.parse(schemas.DeactivateSchema(), _body(optional=True))
    return _json(_models().deactivate(_publisher()))


class Operation:
    """Something that takes long: it runs beside the request, and stops when the client leaves."""

    _GONE: Event = ("gone", {})

    def __init__(self, work: Callable[[Emit], Any], publish: Emit) -> None:
        self._publish = publish
        self._events: Queue[Event] = Queue()
        self._answer: Any = None
        self._error: BaseException | None = None
        self._worker = gevent.spawn(self._run, work)

    def result(self, environ: dict[str, Any]) -> Any:
        """Wait for the end; raises what the work raised."""
        for _ in self._until_end(environ):
            pass
        return self._answer

    def events(self, environ: dict[str, Any], request_id: str) -> Iterator[bytes]:
        """The events as an SSE body, ending with the work's completion or an ``error`` event."""
        yield b""  # the head goes out before the first event
        try:
            for event in self._until_end(environ, HEARTBEAT):
                if event is None:
                    yield KEEP_ALIVE
                elif event[0].endswith(("_progress", "_complete")):
                    answer = self._answer if event[0].endswith("_complete") else {}
                    yield _event(event[0], {**answer, **event[1]})
        except ClientGone:
            return
        except GatewayError as error:
            told = {"error": error.message, "status": error.status, "requestId": request_id}
            if error.details:
                told["details"] = error.details
            yield _event("error", told)

    def _run(self, work: Callable[[Emit], Any]) -> None:
        completed: list[Event] = []

        def emit(event: str, data: dict[str, Any]) -> None:
            self._publish(event, data)
            # the completion is told last, when the answer is known
            (completed.append if event.endswith("_complete") else self._events.put)((event, data))

        try:
            self._answer = work(emit)
        except GatewayError as error:
            self._error = error
        except gevent.GreenletExit:
            self._error = ClientGone("The client closed the connection.")
        except Exception as error:
            self._error = error
        for event in completed:
            self._events.put(event)
        self._events.put(("end", {}))

    def _until_end(
        self, environ: dict[str, Any], heartbeat: float | None = None
    ) -> Iterator[Event | None]:
        """The events in order, None after each ``heartbeat`` s without one. A client that leaves
        stops the work."""
        watch = cancellation.watch(environ, lambda: self._events.put(self._GONE))
        try:
            while True:
                try:
                    event = self._events.get(timeout=heartbeat)
                except gevent.queue.Empty:
                    yield None
                    continue
                if event is self._GONE:
                    raise ClientGone("The client closed the connection.")
                if event[0] == "end":
                    break
                yield event
            if self._error is not None:
                raise self._error
        finally:
            if watch is not None:
                watch.stop()
            self._worker.kill(block=False)  # nothing to kill unless the client left


def _models() -> Models:
    models: Models = current_app.extensions["gateway"].models
    return models


def _publisher() -> Emit:
    """What tells the world of the current request's operation."""
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
    content = read_body(request.environ, current_app.extensions["gateway"].settings.max_body_bytes)
    if optional and not content.strip():
        return {}
    try:
        return json.loads(content.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise BadRequest("The body is not valid JSON.", code="invalid_json") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _wants_events() -> bool:
    return "text/event-stream" in request.environ.get("HTTP_ACCEPT", "").lower()


def _event_stream(body: Iterator[bytes]) -> Response:
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
    return Response(body, content_type="text/event-stream; charset=utf-8", headers=headers)


def _event(name: str, data: dict[str, Any]) -> bytes:
    told = {"timestamp": timestamp(time.time()), **data}
    return b"event: " + name.encode() + b"\ndata: " + dumps(told) + b"\n\n"


def _json(value: Any) -> Response:
    return Response(dumps(value), content_type="application/json")
