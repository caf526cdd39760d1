"""The two ways to reach LM Studio: its SDK's WebSocket and its HTTP server.

:mod:`.link` manages models through the official SDK and is the file to read first; :mod:`.loading`
is a load, :mod:`.sessions` keeps the SDK connected, :mod:`.sdk` extends it, :mod:`.load_config` is
the table of load settings.
:mod:`.monitor` notices that LM Studio goes away or comes back.
:mod:`.http` sends inference requests over the connections that :mod:`.adapter` keeps; an
:mod:`.exchange` is one request with its response, which :mod:`.http1` parses.

This package must not know about Flask, about clients or about the shared state.
"""

from gateway.lmstudio import load_config, sockets
from gateway.lmstudio.exchange import ConnectionBroken, Exchange, ReadTimeout
from gateway.lmstudio.http import Upstream
from gateway.lmstudio.http1 import TOKEN, header_line
from gateway.lmstudio.link import Link, get_link
from gateway.lmstudio.monitor import Monitor
from gateway.lmstudio.sdk import LinkLost, ServerRefused

__all__ = [
    "TOKEN",
    "ConnectionBroken",
    "Exchange",
    "Link",
    "LinkLost",
    "Monitor",
    "ReadTimeout",
    "ServerRefused",
    "Upstream",
    "get_link",
    "header_line",
    "load_config",
    "sockets",
]
