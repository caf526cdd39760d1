"""The blueprint of the proxied paths."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, current_app, request
from werkzeug.routing import Rule

from gateway import errors
from gateway.proxy.exchange import Proxy

# The blueprint --------------------------------------------------------------------------------

blueprint = Blueprint("proxy", __name__)


@blueprint.record
def _register(state: Any) -> None:
    """Every proxied path, for every method: a rule of werkzeug's, as Flask's own always restrict
    the methods."""
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
    answer = proxy.exchange(request.environ)
    response = Response(answer.body, direct_passthrough=True)
    response.headers.clear()
    for name, value in answer.headers:
        response.headers.add(name, value)
    response.status = answer.status
    return response
