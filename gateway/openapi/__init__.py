"""Describes the API at ``/openapi.json`` in OpenAPI 3.1, for client generators and API browsers.

:mod:`.document` assembles the document and is the file to read first; :mod:`.operations` lists
every path with its operations, :mod:`.shapes` the JSON of the gateway's own responses.
:mod:`.views` is the blueprint.

This package must not know how the operations that it describes are implemented.
"""

from gateway.openapi.views import blueprint

__all__ = ["blueprint"]
