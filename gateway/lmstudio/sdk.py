"""Adds to the official SDK (``lmstudio`` 1.5.0) what it lacks: API tokens, TLS, a quiet log,
cancelling.

Only this module, :mod:`.sessions` and :mod:`.link` use private names of the SDK;
``tests/unit/lmstudio/test_sdk_contract.py`` fails when a release moves them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
from contextlib import suppress
from typing import Any

import gevent
import lmstudio
from lmstudio._ws_thread import SyncToAsyncWebsocketBridge
from lmstudio.sync_api import SyncLMStudioWebsocket

from gateway.errors import BadGateway, Unreachable

_API_TOKEN = re.compile(r"sk-lm-([A-Za-z0-9]{8}):([A-Za-z0-9]{20})")
#: The loggers of the SDK, named after its classes, and of its WebSocket library.
NOISY_LOGGERS = (
    "AsyncWebsocketHandler",
    "AsyncWebsocketThread",
    "SyncLMStudioWebsocket",
    "SyncRemoteCall",
    "SyncToAsyncWebsocketBridge",
    "httpx",
    "httpcore",
    "httpx_ws",
)


class LinkLost(Unreachable):
    """The connection was lost during a call. The next call connects again."""


class ServerRefused(Exception):
    """LM Studio responded to a call with an error.

    ``code`` is the error's ``displayData.code``, or empty.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class TokenClient(lmstudio.Client):
    """The SDK's client with an API token (1.5.0 has no argument for one)."""

    api_token = ""

    def _create_auth_message(self) -> Any:
        match = _API_TOKEN.fullmatch(self.api_token)
        if match:
            # the protocol has no header for the token: its halves are identifier and passkey
            return self._format_auth_message(*match.groups())
        return self._format_auth_message(f"guest:{os.urandom(9).hex()}")


class GuardedWebsocket(SyncLMStudioWebsocket):
    """The SDK's WebSocket, which can be abandoned while it connects and reports why it failed.

    The SDK's own ``connect`` keeps no reference to a connecting socket, so that an LM Studio that
    accepts and then sends nothing would leak one with each attempt. It also fails to parse the
    message of a rejected authentication.
    """

    def connect(self) -> Any:
        bridge = SyncToAsyncWebsocketBridge(
            self._ws_thread, self._ws_url, self._auth_details, self._logger.event_context
        )
        try:
            connected = bridge.connect()
        except BaseException:
            with suppress(Exception), gevent.Timeout(1, False):
                bridge.disconnect()
            raise
        if bridge._auth_failure is not None:
            raise BadGateway(
                "LM Studio refused the gateway's authentication. Check LMSTUDIO_API_TOKEN."
            )
        if not connected:
            raise LinkLost(f"no WebSocket: {type(bridge._connection_failure).__name__}")
        self._ws = bridge
        return self


class PlainParameter:
    """Lets ``remote_call`` send a plain dict."""

    def __init__(self, parameter: dict[str, Any]) -> None:
        self._parameter = parameter

    def to_dict(self) -> dict[str, Any]:
        return self._parameter


def ignore_proxies() -> None:
    """Keep HTTP(S)_PROXY and ALL_PROXY from diverting the SDK's socket: LM Studio is on the LAN."""
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"


def use_selector_loop() -> None:
    """Make the SDK's asyncio loop cooperate with gevent on Windows.

    The loop runs in a greenlet. The default one of Windows (IOCP) would block all others; gevent
    has patched the select() of this one.
    """
    if sys.platform == "win32":
        asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())


def silence_sdk() -> None:
    """Keep the SDK's messages out of the gateway's log; its errors are raised as exceptions too."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def cancel_load(session: Any, endpoint: Any, channel: Any) -> None:
    """Cancel a load, which would otherwise continue after a timeout or a killed greenlet."""
    if not endpoint.is_finished and session._lmsws is not None:
        with suppress(Exception):
            channel.cancel()


def refusal(error: lmstudio.LMStudioServerError) -> ServerRefused:
    """Convert an error of the SDK; the message is LM Studio's title, cause and suggestion."""
    raw: Any = error._raw_error or {}
    title = raw.get("title") or raw.get("rootTitle") or str(error)
    parts = [str(part).strip() for part in (title, raw.get("cause"), raw.get("suggestion")) if part]
    display = raw.get("displayData")
    code = display.get("code", "") if isinstance(display, dict) else ""
    return ServerRefused(" ".join(parts), str(code))
