"""Keeps the SDK's sessions connected.

The SDK has one session for each namespace of LM Studio's API, with a WebSocket of its own. This
module adds what a long-lived server needs: connection attempts that concurrent callers share,
retries, deadlines, and reconnecting after a loss.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import gevent
import lmstudio

from gateway.errors import BadGateway, GatewayError, Unreachable, UpstreamTimeout
from gateway.lmstudio.addresses import Addresses
from gateway.lmstudio.sdk import (
    GuardedWebsocket,
    LinkLost,
    TokenClient,
    ignore_proxies,
    refusal,
    silence_sdk,
    use_selector_loop,
)
from gateway.logs import Throttle
from gateway.settings import Settings

#: Seconds for one connection attempt to one address, from TCP to authentication.
CONNECT_TIMEOUT = 5.0
#: Seconds to wait for the reply to a remote call.
CALL_TIMEOUT = 10.0

#: Characters of a malformed message that the error about it quotes.
MAX_QUOTED = 300

#: The namespaces in which the gateway makes calls.
NAMESPACES = ("llm", "embedding", "system")

logger = logging.getLogger(__name__)
_throttle = Throttle(logger)


class _Connecting:
    """One series of connection attempts, shared by every caller that waits for it."""

    def __init__(self, attempts: int) -> None:
        self.attempts = attempts
        self.done = threading.Event()
        self.error: GatewayError | None = None


class Sessions:
    """The sessions of one worker process, connected on first use.

    ``on_trouble`` is called for whatever a lost LM Studio would explain. For what the methods raise
    see :class:`.link.Link`.
    """

    def __init__(self, settings: Settings, on_trouble: Callable[[], None]) -> None:
        parts = urlsplit(settings.lmstudio_base_url)
        self._tls = parts.scheme == "https"
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or (443 if self._tls else 80)
        self._addresses = Addresses(self._host, self._port)
        self._on_trouble = on_trouble
        self.configure(settings)
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._connecting: dict[str, _Connecting] = {}
        self._client: TokenClient | None = None

    def configure(self, settings: Settings) -> None:
        """Take other settings, which count from the next connection on."""
        self._attempts = settings.sdk_max_attempts
        self._retry_delay = settings.sdk_retry_delay
        self._token = settings.lmstudio_api_token

    @contextmanager
    def session(self, namespace: str) -> Iterator[Any]:
        """Provide a connected session of the SDK, and convert its errors to the gateway's."""
        websocket = self.connect(namespace)
        session = getattr(self._client, namespace)
        try:
            yield session
        except lmstudio.LMStudioWebsocketError:
            self._drop(session, websocket)
            raise LinkLost("The connection to LM Studio was lost.") from None
        except lmstudio.LMStudioTimeoutError:
            # stays connected: another call or load may be using the same socket
            self._on_trouble()
            raise UpstreamTimeout("LM Studio did not answer in time.") from None
        except lmstudio.LMStudioServerError as error:
            raise refusal(error) from None
        except lmstudio.LMStudioError as error:
            text = " ".join(str(error).split())[:MAX_QUOTED]
            raise BadGateway(f"LM Studio sent something malformed: {text}") from None
        except (AssertionError, AttributeError):
            # the SDK's attributes become None if the connection is lost between check and use
            if session._lmsws is websocket and websocket._httpx_ws is not None:
                raise
            self._drop(session, websocket)
            raise LinkLost("The connection to LM Studio was lost.") from None

    def connect(self, namespace: str, attempts: int | None = None) -> Any:
        """Return a namespace's live WebSocket; concurrent callers share the connection attempts.

        ``attempts`` overrides the setting.
        """
        attempts = attempts or self._attempts
        if os.getpid() != self._pid:
            raise RuntimeError("the SDK client was created before a fork; do not use preload_app")
        while True:
            with self._lock:
                websocket = self._live_websocket(namespace)
                if websocket is not None:
                    return websocket
                connecting = self._connecting.get(namespace)
                is_first = connecting is None
                if connecting is None:
                    connecting = self._connecting[namespace] = _Connecting(attempts)
            if is_first:
                self._connect_for_all(namespace, connecting)
            else:
                connecting.done.wait()
            if connecting.error is not None and connecting.attempts >= attempts:
                raise type(connecting.error)(connecting.error.message)

    def close(self) -> None:
        """Close every WebSocket; the next call connects again."""
        if self._client is not None:
            for namespace in NAMESPACES:
                with suppress(Exception):
                    getattr(self._client, namespace).disconnect()

    def _live_websocket(self, namespace: str) -> Any:
        """Return a namespace's WebSocket, or None if there is none or its connection is lost.

        Disconnects a lost one, because the SDK never reconnects by itself.
        """
        if self._client is None:
            return None
        session = getattr(self._client, namespace)
        websocket = session._lmsws
        if websocket is not None and websocket._httpx_ws is None:
            with suppress(Exception):
                session.disconnect()
            return None
        return websocket

    def _connect_for_all(self, namespace: str, connecting: _Connecting) -> None:
        try:
            self._connect(namespace, connecting.attempts)
        except GatewayError as error:
            connecting.error = error
        except BaseException:
            connecting.error = Unreachable("Connecting to LM Studio was interrupted.")
            raise
        finally:
            with self._lock:
                del self._connecting[namespace]
            connecting.done.set()

    def _connect(self, namespace: str, attempts: int) -> None:
        reason: Exception | None = None
        for attempt in range(1, attempts + 1):
            if attempt > 1:
                gevent.sleep(self._retry_delay)
            try:
                self._open(namespace)
                return
            except (LinkLost, lmstudio.LMStudioWebsocketError, OSError) as error:
                logger.debug("connection attempt %d to LM Studio's SDK failed: %s", attempt, error)
                reason = error
        self._on_trouble()
        _throttle.warning(
            "connect", "LM Studio's SDK can't be connected to (%d attempts): %s", attempts, reason
        )
        raise Unreachable(
            f"Failed to connect to LM Studio SDK after {attempts} attempts. "
            "Ensure LM Studio is running and the API server is enabled."
        )

    def _open(self, namespace: str) -> None:
        """Open a session's WebSocket, at the first address that accepts it."""
        failure: Exception = LinkLost("the host name has no address")
        # with TLS it stays a name, to match the certificate, and the SDK tries all its addresses
        for address in [self._host] if self._tls else self._addresses.in_turn():
            try:
                with gevent.Timeout(CONNECT_TIMEOUT, LinkLost("timeout")):
                    self._open_at(namespace, address)
                self._addresses.worked(address)
                return
            except (LinkLost, lmstudio.LMStudioWebsocketError, OSError) as error:
                failure = error
        raise failure

    def _open_at(self, namespace: str, address: str) -> None:
        """Open a session's WebSocket. The SDK would do it with a URL that is always ``ws://``, and
        resolving a name inside its loop can hang (gevent issue 2213)."""
        client = self._sdk_client()
        session: Any = getattr(client, namespace)
        scheme = "wss" if self._tls else "ws"
        host = f"[{address}]" if ":" in address else address
        url = f"{scheme}://{host}:{self._port}/{namespace}"
        websocket = GuardedWebsocket(client._ws_thread, url, client._auth_details)
        websocket.on_lost = self._on_trouble
        session._lmsws = session._resources.enter_context(websocket)

    def _sdk_client(self) -> TokenClient:
        # one client for the life of the process: the loop of a second one would never start
        if self._client is None:
            silence_sdk()
            ignore_proxies()
            use_selector_loop()
            lmstudio.set_sync_api_timeout(CALL_TIMEOUT)
            client_type = type("GatewayClient", (TokenClient,), {"api_token": self._token})
            self._client = client_type(f"{self._host}:{self._port}")
        return self._client

    def _drop(self, session: Any, websocket: Any) -> None:
        """Disconnect a session, unless another caller has replaced its WebSocket meanwhile."""
        with self._lock:
            if session._lmsws is websocket:
                with suppress(Exception):
                    session.disconnect()
