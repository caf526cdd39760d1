"""Model management over HTTP: list, load, unload, activate, deactivate.

:mod:`.views` is the blueprint and the file to read first; :mod:`.schemas` validates the bodies,
:mod:`.models` does the work through the link and the store, and :mod:`.operation` runs a long
operation beside the request that started it.

This package must not know about inference.
"""

from gateway.admin import schemas
from gateway.admin.models import Models
from gateway.admin.operation import Operation
from gateway.admin.views import blueprint

__all__ = ["Models", "Operation", "blueprint", "schemas"]
