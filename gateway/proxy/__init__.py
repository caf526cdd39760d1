"""The inference proxy: relays a request to LM Studio and the response to the client.

:mod:`.exchange` follows one request from start to end and is the file to read first. On the way
out, :mod:`.injection` adds the fields that the client left out, and :mod:`.members` splices them
into the body. On the way back, :mod:`.relay` passes on the bytes as they arrive, :mod:`.usage`
counts tokens and :mod:`.repair` rewrites LM Studio's errors. :mod:`.views` is the blueprint.

This package must not know how models are managed or how events are stored.
"""

from gateway.proxy.exchange import RECORDED, Proxy
from gateway.proxy.injection import ENDPOINTS, Endpoint
from gateway.proxy.views import blueprint

__all__ = ["ENDPOINTS", "RECORDED", "Endpoint", "Proxy", "blueprint"]
