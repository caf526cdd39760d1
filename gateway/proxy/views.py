"""The blueprint of the proxied paths.

The busiest of them never reach it: see :class:`gateway.front.Front`.
"""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, current_app, request
from werkzeug.routing import Rule

from gateway import errors
from gateway.proxy.exchange import Proxy

blueprint = Blueprint("proxy", __name__)


@blueprint.record
def _register(state: Any) -> None:
    """Register every proxied path for every method.

    The rules are werkzeug's own because Flask's always restrict the methods.
    """
    paths = [
        "/v1/<path:rest>",
        "/api/<path:rest>",
        "/models/<path:rest>",
        *sorted(errors.SHORTHAND),
    ]
    for path in paths:
        state.app.url_map.add(Rule(path, endpoint="proxy.exchange", methods=None))
    state.app.view_functions["proxy.exchange"] = view


def view(rest: str = "") -> Response:
    """Relay the current request."""
    proxy: Proxy = current_app.extensions["gateway"].proxy
    proxied = proxy.exchange(request.environ)
    response = Response(proxied.body, direct_passthrough=True)
    response.headers.clear()
    for name, value in proxied.headers:
        response.headers.add(name, value)
    response.status = proxied.status
    return response
