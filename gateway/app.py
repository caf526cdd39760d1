"""The application factory: builds the parts, registers the blueprints, and does nothing else."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import gevent
from flask import Flask, Response, request
from flask.json.provider import JSONProvider
from werkzeug.exceptions import HTTPException

from gateway import admin, debug, front, openapi, proxy, settings, version
from gateway.admin import Models, Operation
from gateway.errors import GatewayError, dumps
from gateway.lmstudio import Link, Monitor, Upstream, get_link
from gateway.observe import AccessLog, EventBus, HostReporter, Metrics, Reporter
from gateway.request import Access
from gateway.settings import Settings
from gateway.state import SharedStore, open_store

#: Seconds between two runs of a worker's maintenance, which closes old connections, reports the
#: progress of streams and shares counters with other machines.
MAINTENANCE_INTERVAL = 1.0

_BLUEPRINTS = (
    admin.blueprint,
    debug.blueprint,
    debug.health,
    debug.prometheus,
    openapi.blueprint,
    proxy.blueprint,
)


@dataclass
class Gateway:
    """The parts of one worker, at ``app.extensions["gateway"]``."""

    settings: Settings
    store: SharedStore
    upstream: Upstream
    link: Link
    models: Models
    events: EventBus
    metrics: Metrics
    log: AccessLog
    reporter: Reporter
    access: Access
    proxy: proxy.Proxy
    monitor: Monitor
    hosts: HostReporter
    #: The model loads in progress, whose clients wait for them.
    operations: set[Operation]
    #: The event streams that this worker's clients read.
    event_streams: set[debug.EventStream]
    front: front.Front = field(init=False)
    #: When this worker started (time.monotonic()).
    started: float

    def start(self) -> None:
        """Start the background work. Called in the worker, after the fork."""
        self.events.start()
        self.log.start()
        gevent.spawn(self._monitor)
        gevent.spawn(self._maintain)

    def reconfigure(self, configured: Settings) -> None:
        """Apply other settings from the next request on; requests in flight keep theirs."""
        self.settings = configured
        self.access = Access(configured)
        self.front.configure(self.access, configured.max_body_bytes)
        self.proxy.configure(self.access, configured)
        self.upstream.configure(configured)
        self.link.configure(configured)
        self.log.configure(configured.log_level)

    def drain(self) -> None:
        """End the event streams; other requests may finish. Called when the grace period begins."""
        self.events.stop_streams()

    def cut_streams(self) -> None:
        """Cut the event streams whose clients do not read, and so do not see their end."""
        for stream in list(self.event_streams):
            stream.cut()

    def abort(self) -> None:
        """Abort what is still in flight. Called shortly before the grace period ends."""
        self.proxy.abort_all()
        for operation in list(self.operations):
            operation.abort("The gateway is shutting down.")

    def stop(self) -> None:
        """Write what is still queued and release everything. Called after the last request."""
        self.link.finish_cancelling()
        self.events.stop()
        self.log.stop()
        self.store.close()

    def _monitor(self) -> None:
        if self.hosts.is_down():
            self.monitor.suspect()
        self.monitor.run()

    def _maintain(self) -> None:
        while True:
            gevent.sleep(MAINTENANCE_INTERVAL)
            self.upstream.adapter.close_stale()
            self.reporter.report_progress()
            if self.store.multi_machine:
                with suppress(GatewayError):
                    self.store.share_counters(self.metrics.totals())


def create_app(configured: Settings | None = None) -> Flask:
    """Build the WSGI application.

    Without ``configured`` the settings are read from the environment, which raises SettingsError if
    they are invalid.
    """
    app = Flask("gateway", static_folder=None)
    app.json = _Json(app)
    app.response_class = _Response
    app.url_map.merge_slashes = False  # a path with repeated slashes is unknown, not redirected
    app.url_map.strict_slashes = False
    # read it now: by the time of the first request the checkout may have moved to another commit
    version.commit()
    parts = _build(configured or settings.load(), app.instance_path)
    app.extensions["gateway"] = parts
    app.register_error_handler(GatewayError, _gateway_error)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unexpected)
    for blueprint in _BLUEPRINTS:
        app.register_blueprint(blueprint)
    parts.front = front.Front(
        app.wsgi_app,
        parts.proxy,
        parts.access,
        parts.metrics,
        parts.log,
        parts.settings.max_body_bytes,
    )
    app.wsgi_app = parts.front  # type: ignore[method-assign]
    return app


def _build(configured: Settings, instance_path: str) -> Gateway:
    access = Access(configured)
    store = open_store(configured.state_url, instance_path)
    upstream = Upstream(configured)
    link = get_link(configured)
    metrics = Metrics()
    events = EventBus(store, metrics.dropped)
    log = AccessLog(configured.log_level, configured.log_format)
    reporter = Reporter(events, metrics, log)
    hosts = HostReporter(store, events)
    monitor = Monitor(upstream.greet, hosts.report)
    upstream.adapter.on_trouble = link.on_trouble = monitor.suspect
    return Gateway(
        settings=configured,
        store=store,
        upstream=upstream,
        link=link,
        models=Models(link, store),
        events=events,
        metrics=metrics,
        log=log,
        reporter=reporter,
        access=access,
        proxy=proxy.Proxy(access, configured, store, upstream, reporter),
        monitor=monitor,
        hosts=hosts,
        operations=set(),
        event_streams=set(),
        started=time.monotonic(),
    )


class _Response(Response):
    """Flask's response, but without a content type unless the view gives one; Flask's is HTML."""

    default_mimetype = None


class _Json(JSONProvider):
    """Serializes the dictionaries that views return with :func:`gateway.errors.dumps`."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        return dumps(obj).decode()

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        return json.loads(s)


def _gateway_error(error: GatewayError) -> Response:
    status, headers, body = front.error_response(request.environ, error)
    return Response(body, status, headers)


def _http_error(fault: HTTPException) -> Response:
    """Turns werkzeug's errors (no such route, wrong method) into the dialect of the path."""
    status = fault.code or 500
    path = request.environ["PATH_INFO"]
    messages = {404: f"Unknown path: {path}", 405: f"{request.method} is not allowed on {path}"}
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "invalid_request")
    allow: Any = [("Allow", value) for name, value in fault.get_headers() if name == "Allow"]
    message = messages.get(status) or fault.description or fault.name
    return _gateway_error(GatewayError(message, status=status, code=code, headers=allow))


def _unexpected(fault: Exception) -> Response:
    return _gateway_error(front.unexpected(request.environ, fault))
