"""The views that show what the gateway is doing: dashboard, status, events, metrics and health.

:mod:`.views` is the blueprint of ``/debug`` and the file to read first; :mod:`.status` and
:mod:`.performance` compute its JSON, :mod:`.stream` is the body of its event stream, and
:mod:`.dashboard` has the page that shows all this in a browser. :mod:`.prometheus` serves
``/metrics`` and :mod:`.health` serves ``/health``.

This package only reads. It must not know how models, state or exchanges are changed.
"""

from gateway.debug.health import blueprint as health
from gateway.debug.prometheus import blueprint as prometheus
from gateway.debug.stream import EventStream
from gateway.debug.views import blueprint

__all__ = ["EventStream", "blueprint", "health", "prometheus"]
