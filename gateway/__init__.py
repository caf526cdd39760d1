"""A gateway in front of LM Studio: OpenAI-compatible proxy and model management.

:func:`gateway.app.create_app` builds the WSGI application, ``lmstudio-gateway`` (see
:mod:`gateway.commands`) runs it.
"""

__version__ = "0.1.0"
