"""The application factory: builds the parts, registers the blueprints, nothing else."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import gevent
from flask import Flask, Response, current_app, request
from werkzeug.exceptions import HTTPException

from gateway import admin, debug, front, health, metrics, openapi, proxy, settings
from gateway.access import Access
from gateway.accounts import AccessLog, Accounts
from gateway.errors import GatewayError
from gateway.events import EventBus
from gateway.lmstudio_link import get_link
from gateway.metrics import Metrics
from gateway.models import Models
from gateway.store import SharedStore, open_store
from gateway.upstream import Upstream

#: Seconds between two tellings of this machine's counters to the others, and other housekeeping.
HOUSE_SECONDS = 1.0

_BLUEPRINTS = (
    health.blueprint,
    admin.blueprint,
    debug.blueprint,
    metrics.blueprint,
    openapi.blueprint,
    proxy.blueprint,
)


@dataclass(frozen=True)
class Gateway:
    """The parts of one worker, at ``app.extensions["gateway"]``."""

    settings: settings.Settings
    store: SharedStore
    upstream: Upstream
    models: Models
    events: EventBus
    metrics: Metrics
    log: AccessLog
    accounts: Accounts
    proxy: proxy.Proxy
    front: front.Front
    #: When this worker started (time.monotonic()).
    started: float

    def start(self) -> None:
        """The worker begins to serve."""
        self.events.start()
        self.log.start()
        gevent.spawn(self._keep_house)

    def drain(self) -> None:
        """The worker accepts no more: event streams end, what else runs may finish."""
        self.events.stop_streams()

    def stop(self) -> None:
        """The worker has served its last request."""
        self.events.stop()
        self.log.stop()
        self.store.close()

    def _keep_house(self) -> None:
        """For the life of the worker: what is to be done every so often."""
        while True:
            gevent.sleep(HOUSE_SECONDS)
            self.upstream.adapter.close_old()
            self.accounts.tell_progress()
            if self.store.many_machines:
                with suppress(GatewayError):
                    self.store.share_counters(debug.own_counters(self))


def create_app(configured: settings.Settings | None = None) -> Flask:
    """Build the WSGI application; settings are read from the environment unless given."""
    configured = configured or settings.load()
    app = Flask("gateway", static_folder=None)
    app.response_class = _Response
    app.url_map.merge_slashes = False  # a path is what it is; no redirects
    app.url_map.strict_slashes = False
    app.extensions["gateway"] = _build(configured, app.instance_path)
    app.before_request(_enter)
    app.after_request(_leave)
    app.register_error_handler(GatewayError, _gateway_error)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unexpected)
    for blueprint in _BLUEPRINTS:
        app.register_blueprint(blueprint)
    parts: Gateway = app.extensions["gateway"]
    app.wsgi_app = front.HotPath(app.wsgi_app, parts.front, parts.proxy)  # type: ignore[method-assign]
    return app


def _build(configured: settings.Settings, instance_path: str) -> Gateway:
    access = Access(configured)
    store = open_store(configured.state_url, instance_path)
    upstream = Upstream(configured)
    counted = Metrics()
    bus = EventBus(store, counted.dropped)
    log = AccessLog(configured.log_level, configured.log_format)
    models = Models(get_link(configured), store)
    accounts = Accounts(bus, counted, log)
    relay = proxy.Proxy(configured, access, store, upstream, accounts)
    ways = front.Front(access, counted, log, configured.max_body_bytes)
    return Gateway(
        settings=configured,
        store=store,
        upstream=upstream,
        models=models,
        events=bus,
        metrics=counted,
        log=log,
        accounts=accounts,
        proxy=relay,
        front=ways,
        started=time.monotonic(),
    )


def _parts() -> Gateway:
    parts: Gateway = current_app.extensions["gateway"]
    return parts


class _Response(Response):
    """Flask's, which would call HTML what has no type, even an empty answer."""

    default_mimetype = None


def _enter() -> Response | None:
    return _Response(status=204) if _parts().front.enter(request.environ) else None


def _leave(response: Response) -> Response:
    headers = _parts().front.leave(request.environ, response.status_code, response.content_length)
    for name, value in headers:
        response.headers.add(name, value)
    return response


def _gateway_error(error: GatewayError) -> Response:
    status, headers, body = front.error_response(request.environ, error)
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
    return _gateway_error(front.unexpected(request.environ, fault))
