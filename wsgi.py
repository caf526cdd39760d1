"""The WSGI application for ``gunicorn wsgi:app``, which also reads gunicorn.conf.py beside it."""

from gateway.app import create_app

app = create_app()
