"""The application factory: builds the parts, registers the blueprints, nothing else."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from flask import Flask, Response, current_app, request
from werkzeug.exceptions import HTTPException

from gateway import admin, errors, health, proxy, settings
from gateway.access import REQUEST_ID, Access, name_request
from gateway.errors import GatewayError
from gateway.lmstudio_link import get_link
from gateway.models import Models
from gateway.store import SharedStore, open_store
from gateway.upstream import Upstream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gateway:
    """The parts of one worker, at ``app.extensions["gateway"]``."""

    settings: settings.Settings
    access: Access
    store: SharedStore
    upstream: Upstream
    models: Models
    proxy: proxy.Proxy
    #: When this worker started (time.time()).
    started: float


def create_app(configured: settings.Settings | None = None) -> Flask:
    """Build the WSGI application; settings are read from the environment unless given."""
    configured = configured or settings.load()
    app = Flask("gateway", static_folder=None)
    app.url_map.merge_slashes = False  # a path is what it is; no redirects
    app.url_map.strict_slashes = False
    app.extensions["gateway"] = _build(configured, app.instance_path)
    app.before_request(_admit)
    app.after_request(_complete)
    app.register_error_handler(GatewayError, _gateway_error)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unexpected)
    for blueprint in (health.blueprint, admin.blueprint, proxy.blueprint):
        app.register_blueprint(blueprint)
    return app


def _build(configured: settings.Settings, instance_path: str) -> Gateway:
    access = Access(configured)
    store = open_store(configured.state_url, instance_path)
    upstream = Upstream(configured)
    models = Models(get_link(configured), store)
    relay = proxy.Proxy(configured, access, store, upstream)
    return Gateway(configured, access, store, upstream, models, relay, time.time())


def _parts() -> Gateway:
    parts: Gateway = current_app.extensions["gateway"]
    return parts


def _admit() -> Response | None:
    """Access first, then the announced size of the body; both before a byte of it is read."""
    parts = _parts()
    if parts.access.admit(request.environ):
        return Response(status=204)
    proxy.check_length(request.environ, parts.settings.max_body_bytes)
    return None


def _complete(response: Response) -> Response:
    environ = request.environ
    response.headers["X-Request-Id"] = environ.get(REQUEST_ID) or name_request(environ)
    for name, value in _parts().access.cors_headers(environ):
        response.headers.add(name, value)
    return response


def _gateway_error(error: GatewayError) -> Response:
    environ = request.environ
    request_id = environ.get(REQUEST_ID) or name_request(environ)
    status, headers, body = errors.response(
        error, environ["PATH_INFO"], request_id, method=request.method
    )
    return Response(body, status, headers)


def _http_error(fault: HTTPException) -> Response:
    """werkzeug's own refusals (no such route, wrong method) in the dialect of the path."""
    status = fault.code or 500
    path = request.environ["PATH_INFO"]
    words = {404: f"Unknown path: {path}", 405: f"{request.method} is not allowed on {path}"}
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "invalid_request")
    allow: Any = [("Allow", value) for name, value in fault.get_headers() if name == "Allow"]
    message = words.get(status) or fault.description or fault.name
    return _gateway_error(GatewayError(message, status=status, code=code, headers=allow))


def _unexpected(fault: Exception) -> Response:
    logger.exception("unexpected error: %s %s", request.method, request.path, exc_info=fault)
    return _gateway_error(GatewayError("The gateway failed; its log says more."))
