"""gunicorn's configuration for ``gunicorn wsgi:app``, derived from the gateway's settings."""

from gevent import monkey

monkey.patch_all()

from gateway.serving import checked_settings_or_exit, gunicorn_options  # noqa: E402

globals().update(gunicorn_options(checked_settings_or_exit()))
