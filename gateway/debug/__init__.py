"""How the gateway is observed over HTTP: dashboard, status, event stream, metrics, health.

:mod:`.views` is the blueprint of ``/debug`` and the file to read first; :mod:`.status` and
:mod:`.performance` compute what it shows, :mod:`.stream` follows the events, and
:mod:`.dashboard` has the page that shows all this in a browser. :mod:`.prometheus` serves
``/metrics`` and :mod:`.health` ``/health``.

This package only reads. It must not know how models, state or exchanges are changed.
"""

from gateway.debug.health import blueprint as health
from gateway.debug.prometheus import blueprint as prometheus
from gateway.debug.views import blueprint

__all__ = ["blueprint", "health", "prometheus"]
