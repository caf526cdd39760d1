"""The two ways to LM Studio: its SDK's WebSocket and its HTTP server.

:mod:`.link` manages models through the official SDK and is the file to read first; :mod:`.sdk`
holds what the SDK lacks, :mod:`.load_config` the table of load settings. :mod:`.http` sends
inference requests, over the connections of :mod:`.adapter`; an :mod:`.exchange` is one of them, and
:mod:`.http1` is the HTTP/1.1 grammar that it reads with.

This package must not know about Flask, about clients or about the shared state.
"""

from gateway.lmstudio import load_config
from gateway.lmstudio.exchange import ConnectionBroken, Exchange, Silence
from gateway.lmstudio.http import Upstream
from gateway.lmstudio.http1 import HEADER_LINE, TOKEN
from gateway.lmstudio.link import Link, get_link
from gateway.lmstudio.sdk import LinkLost, ServerRefused

__all__ = [
    "HEADER_LINE",
    "TOKEN",
    "ConnectionBroken",
    "Exchange",
    "Link",
    "LinkLost",
    "ServerRefused",
    "Silence",
    "Upstream",
    "get_link",
    "load_config",
]
