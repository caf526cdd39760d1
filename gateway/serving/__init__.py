"""How processes serve and drain: HTTP/1.1 in, WSGI, responses out.

:mod:`.launch` starts gunicorn, or gevent's own server, and is the file to read first;
:mod:`.worker` is gunicorn's side. A :mod:`.connection` reads requests (:mod:`.reading`,
:mod:`.parsing`), calls the WSGI application and writes its responses (:mod:`.response`).

This package must not know what the application does with a request.
"""

from gateway.serving.launch import (
    gunicorn_options,
    servable_or_exit,
    serve_gevent,
    serve_gunicorn,
    settings_or_exit,
)

__all__ = [
    "gunicorn_options",
    "servable_or_exit",
    "serve_gevent",
    "serve_gunicorn",
    "settings_or_exit",
]
