"""How processes serve and drain: HTTP/1.1 in, WSGI, responses out.

:mod:`.launch` starts gunicorn, or gevent's own server, and is the file to read first;
:mod:`.worker` holds gunicorn's worker class and hooks. A :mod:`.connection` reads requests
(:mod:`.reading`, :mod:`.parsing`), calls the WSGI application and writes its responses
(:mod:`.response`).

This package must not know what the application does with a request.
"""

from gateway.serving.launch import (
    checked_settings_or_exit,
    gunicorn_options,
    serve_gevent,
    serve_gunicorn,
    settings_or_exit,
)

__all__ = [
    "checked_settings_or_exit",
    "gunicorn_options",
    "serve_gevent",
    "serve_gunicorn",
    "settings_or_exit",
]
