"""gunicorn's configuration for ``gunicorn wsgi:app``: everything comes from the settings."""

from gevent import monkey

monkey.patch_all()

from gateway.serving import gunicorn_options, servable_or_exit  # noqa: E402

globals().update(gunicorn_options(servable_or_exit()))
