"""Adds to the official SDK (``lmstudio`` 1.5.0) what it lacks: API tokens, TLS, a quiet log,
tolerance.

Only this module, :mod:`.sessions` and :mod:`.link` use private names of the SDK;
``tests/unit/lmstudio/test_sdk_contract.py`` fails when a release moves them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import gevent
import lmstudio
from lmstudio._ws_impl import AsyncWebsocketHandler
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
    "WatchedBridge",
    "WatchedHandler",
    "httpx",
    "httpcore",
    "httpx_ws",
)
#: Seconds between two ``keepAlive`` frames. A socket on which no frame arrived in between, not even
#: the acknowledgement, has lost its LM Studio.
KEEP_ALIVE_INTERVAL = 15.0


class LinkLost(Unreachable):
    """The connection was lost during a call. The next call connects again."""


class ServerRefused(BadGateway):
    """LM Studio responded to a call with an error, whose words are the message.

    ``reason`` is the error's ``displayData.code``, or empty.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class TokenClient(lmstudio.Client):
    """The SDK's client with an API token (1.5.0 has no argument for one)."""

    api_token = ""

    def _create_auth_message(self) -> Any:
        match = _API_TOKEN.fullmatch(self.api_token)
        if match:
            # the protocol has no header for the token: its halves are identifier and passkey
            return self._format_auth_message(*match.groups())
        return self._format_auth_message(f"guest:{os.urandom(9).hex()}")


class WatchedHandler(AsyncWebsocketHandler):
    """The SDK's receiving side of a WebSocket, which also notices that LM Studio vanished.

    After a power loss, or on a network that is down, no packet ever says so. Dropping the socket
    ends the calls and loads that wait on it. A frame that the SDK does not expect does not, nor
    does a caller that stops waiting.
    """

    _received = False
    #: Called when the socket is lost.
    on_lost: Callable[[], None] | None = None

    async def _receive_messages(self) -> None:
        tasks = [
            asyncio.ensure_future(super()._receive_messages()),
            asyncio.ensure_future(self._watch()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self.on_lost is not None and not self._ws_disconnected.is_set():
                self.on_lost()

    async def _enqueue_message(self, message: Any) -> bool:
        self._received = True
        frame = readable(message)
        return frame is not None and await super()._enqueue_message(frame)

    async def _process_next_message(self) -> bool:
        try:
            return await super()._process_next_message()
        except ValueError:  # no JSON
            return False

    def _rx_queue_get_threadsafe(self, rx_queue: Any, timeout: float | None) -> Any:
        future = self._task_manager.run_coroutine_threadsafe(rx_queue.get())
        try:
            return future.result(timeout)
        finally:
            # asyncio reports a task that is destroyed while it waits; a finished one stays as it is
            future.cancel()

    async def _watch(self) -> None:
        """Send ``keepAlive`` frames until nothing arrives any more."""
        self._received = True
        while self._received:
            self._received = False
            try:
                async with asyncio.timeout(KEEP_ALIVE_INTERVAL):
                    await self.send_json({"type": "keepAlive"})
            except (TimeoutError, lmstudio.LMStudioError):
                return
            await asyncio.sleep(KEEP_ALIVE_INTERVAL)


class WatchedBridge(SyncToAsyncWebsocketBridge):
    """The SDK's bridge to a WebSocket, with a :class:`WatchedHandler`."""

    _ws_handler: WatchedHandler

    def __init__(self, ws_thread: Any, ws_url: str, auth_details: Any, log_context: Any) -> None:
        super().__init__(ws_thread, ws_url, auth_details, log_context)
        manager = ws_thread.task_manager
        self._ws_handler = WatchedHandler(manager, ws_url, auth_details, log_context)


class GuardedWebsocket(SyncLMStudioWebsocket):
    """The SDK's WebSocket, which can be abandoned while it connects and reports why it failed.

    The SDK's own ``connect`` keeps no reference to a connecting socket, so that an LM Studio that
    accepts and then sends nothing would leak one with each attempt. It also fails to parse the
    message of a rejected authentication.
    """

    #: Called when the socket is lost.
    on_lost: Callable[[], None] | None = None

    def connect(self) -> Any:
        bridge = WatchedBridge(
            self._ws_thread, self._ws_url, self._auth_details, self._logger.event_context
        )
        bridge._ws_handler.on_lost = self.on_lost
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


def readable(message: Any) -> dict[str, Any] | None:
    """Return a frame that the SDK can read, or None for one that it can't.

    The SDK ends the whole socket, with every call and load on it, at one frame that it does not
    know. It reads errors as objects, though LM Studio may send a text.
    """
    match message:
        case (
            {"type": "rpcResult", "callId": int()}
            | {"type": "channelSend", "channelId": int(), "message": dict()}
            | {"type": "channelClose", "channelId": int()}
            | {"type": "rpcError", "callId": int(), "error": dict()}
            | {"type": "channelError", "channelId": int(), "error": dict()}
        ):
            return dict(message)
        case {"type": "rpcError", "callId": int()} | {"type": "channelError", "channelId": int()}:
            title = str(message.get("error") or "LM Studio gave no reason.")
            return {**message, "error": {"title": title}}
    return None


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


def refusal(error: lmstudio.LMStudioServerError) -> ServerRefused:
    """Convert an error of the SDK; the message is LM Studio's title, cause and suggestion."""
    raw: Any = error._raw_error or {}
    title = raw.get("title") or raw.get("rootTitle") or str(error)
    parts = [str(part).strip() for part in (title, raw.get("cause"), raw.get("suggestion")) if part]
    display = raw.get("displayData")
    code = display.get("code", "") if isinstance(display, dict) else ""
    return ServerRefused(" ".join(parts), str(code))
