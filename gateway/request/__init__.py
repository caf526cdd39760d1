"""Who asks for what: reads and checks the WSGI environ of a request before anything is done.

:mod:`.access` decides who is admitted and is the file to read first, with :mod:`.origins` for web
pages; :mod:`.target` works out where a request goes in LM Studio, :mod:`.bodies` reads its body
within limits, :mod:`.headers` chooses the headers to forward in both directions, and
:mod:`.cancellation` notices that the client has disconnected.

This package must not know about Flask, about LM Studio's protocols or about the shared state.
"""

from gateway.request import bodies, cancellation, headers
from gateway.request.access import (
    CLIENT,
    DASHBOARD_PATHS,
    HEALTH_PATHS,
    REQUEST_ID,
    Access,
    is_admin_path,
    request_id_of,
)
from gateway.request.budget import Budget, Share
from gateway.request.cancellation import DELIVERED, SOCKET, ClientDisconnected, ClientWatch
from gateway.request.target import is_authority, normalize, origin_form, upstream_target

__all__ = [
    "CLIENT",
    "DASHBOARD_PATHS",
    "DELIVERED",
    "HEALTH_PATHS",
    "REQUEST_ID",
    "SOCKET",
    "Access",
    "Budget",
    "ClientDisconnected",
    "ClientWatch",
    "Share",
    "bodies",
    "cancellation",
    "headers",
    "is_admin_path",
    "is_authority",
    "normalize",
    "origin_form",
    "request_id_of",
    "upstream_target",
]
