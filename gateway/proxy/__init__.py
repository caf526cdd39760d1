"""The inference proxy: the story of one exchange, from the client's bytes to the last one back.

:mod:`.exchange` tells the story and is the file to read first. On the way out, :mod:`.injection`
adds what the client left out, spliced in by :mod:`.members`; on the way back, :mod:`.relay` passes
on what arrives, :mod:`.usage` counts its tokens and :mod:`.repair` puts LM Studio's errors right.
:mod:`.views` is the blueprint.

This package must not know how models are managed or how events are stored.
"""

from gateway.proxy.exchange import RECORDED, Proxy
from gateway.proxy.injection import TABLE, Endpoint
from gateway.proxy.views import blueprint

__all__ = ["RECORDED", "TABLE", "Endpoint", "Proxy", "blueprint"]
