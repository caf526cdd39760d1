"""gunicorn's configuration for ``gunicorn wsgi:app``: everything comes from the settings."""

from gateway.server import gunicorn_options, servable_or_exit

globals().update(gunicorn_options(servable_or_exit()))
