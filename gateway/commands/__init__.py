"""The command line, ``lmstudio-gateway``.

:mod:`.main` runs a gateway (``serve``, ``check``, ``demo``, ``simulate``) and is the file to read
first. :mod:`.models` and :mod:`.watching` ask a running gateway over HTTP, through :mod:`.client`;
:mod:`.options` are their options, :mod:`.terminal` is their output.

This package knows the gateway's HTTP API. It must not know more of the gateway's parts, but for
``serve``, ``check`` and ``demo``.
"""

from gateway.commands.main import main

__all__ = ["main"]
