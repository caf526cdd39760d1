"""A gateway in front of LM Studio: OpenAI-compatible proxy and model management.

:func:`gateway.app.create_app` builds the WSGI application; the command ``lmstudio-gateway`` (see
:mod:`gateway.commands`) serves it.
"""

from gateway.version import __version__ as __version__
