"""What the official SDK (``lmstudio`` 1.5.0) lacks: an API token, TLS, a quiet log, cancelling.

Private names of the SDK are used here and in :mod:`.link` and nowhere else;
``tests/unit/lmstudio/test_sdk_contract.py`` fails when they move.
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
#: Loggers of the SDK and its WebSocket library; the SDK's carry bare class names (1.5.0).
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
    """The socket died under a call; the next call connects anew."""


class ServerRefused(Exception):
    """LM Studio answered with an error. ``code`` is ``displayData.code`` or empty."""

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
            # identifier and passkey are the token's two halves; there is no header
            return self._format_auth_message(*match.groups())
        return self._format_auth_message(f"guest:{os.urandom(9).hex()}")


class GuardedWebsocket(SyncLMStudioWebsocket):
    """The SDK's socket, which here can be given up while it still connects and says why it failed.

    The SDK's own ``connect`` keeps no handle of a connecting socket (an LM Studio that accepts and
    then stays silent would cost a socket for each attempt) and cannot parse a refusal's text.
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
    """LM Studio is on the LAN: HTTP(S)_PROXY and ALL_PROXY must not divert the SDK's socket."""
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"


def select_on_windows() -> None:
    """The SDK's loop runs in a greenlet: the default one of Windows (IOCP) would block all others,
    the one with select() is gevent's to schedule, as on other systems."""
    if sys.platform == "win32":
        asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())


def quieten_sdk() -> None:
    """Keep the SDK's own chatter out of the gateway's log; its errors reach us as exceptions."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def cancel_load(session: Any, endpoint: Any, channel: Any) -> None:
    # A timeout or a killed greenlet does not stop the load in LM Studio; this does.
    if not endpoint.is_finished and session._lmsws is not None:
        with suppress(Exception):
            channel.cancel()


def refusal_words(error: lmstudio.LMStudioServerError) -> tuple[str, str]:
    """LM Studio's own words (title, cause, suggestion in one line) and its code."""
    raw: Any = error._raw_error or {}
    title = raw.get("title") or raw.get("rootTitle") or str(error)
    words = [str(part).strip() for part in (title, raw.get("cause"), raw.get("suggestion")) if part]
    display = raw.get("displayData")
    code = display.get("code", "") if isinstance(display, dict) else ""
    return " ".join(words), str(code)
