"""The WSGI application for ``gunicorn wsgi:app``; gunicorn.conf.py beside it has the settings."""

from gateway.app import create_app

app = create_app()
