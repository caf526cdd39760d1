"""A stand-in for LM Studio: its SDK WebSockets and its HTTP API on one port, without a model.

It runs in a process of its own (``lmstudio-gateway simulate``). :mod:`.server` is the file to read
first: it describes how tests control the simulator. :mod:`.websocket` and :mod:`.http_api` speak
LM Studio's two protocols, :mod:`.dialects` has the shapes of the responses, :mod:`.models` the
models, and :mod:`.state` what they share.

This package imports nothing of the gateway. It exports nothing here, because gevent must patch the
process before :mod:`.server` is imported.
"""

__all__ = ()
