"""The command line, ``lmstudio-gateway``.

:mod:`.main` runs a gateway (``serve``, ``check``, ``demo``, ``simulate``) and is the file to read
first. :mod:`.models` and :mod:`.watching` manage and watch a running gateway over HTTP, through
:mod:`.client`; :mod:`.options` has their common options, :mod:`.terminal` their output.

This package knows the gateway's HTTP API. Except in ``serve`` and ``check``, it must not know the
gateway's other packages.
"""

from gateway.commands.main import main

__all__ = ["main"]
