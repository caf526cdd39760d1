"""The connection to LM Studio's management side: one guarded SDK client per worker.

The official SDK speaks LM Studio's WebSocket protocol; this module adds what a long-lived server
needs: a first connect that concurrent callers share, several attempts, deadlines, healing after a
drop, a load that can be cancelled.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import gevent
import lmstudio
from lmstudio.json_api import LoadModelEndpoint

from gateway.errors import GatewayError, Unreachable, UpstreamTimeout
from gateway.lmstudio.sdk import (
    GuardedWebsocket,
    LinkLost,
    PlainParameter,
    ServerRefused,
    TokenClient,
    cancel_load,
    ignore_proxies,
    quieten_sdk,
    refusal_words,
    select_on_windows,
)
from gateway.settings import Settings

#: Seconds for one attempt to connect, TCP to authentication.
CONNECT_TIMEOUT = 5.0
#: Seconds for the reply to one remote call.
CALL_TIMEOUT = 10.0
#: Seconds between two messages of a running load. A frozen LM Studio is noticed earlier, by the
#: WebSocket's pings.
LOAD_SILENCE = 300.0

NAMESPACES = ("llm", "embedding", "system")

logger = logging.getLogger(__name__)


class _Connecting:
    """One series of connection attempts, shared by everybody who waits for it."""

    def __init__(self, attempts: int) -> None:
        self.attempts = attempts
        self.done = threading.Event()
        self.error: GatewayError | None = None


class Link:
    """LM Studio's management API for one worker process.

    Methods raise :class:`Unreachable` (503) when no connection can be had, :class:`UpstreamTimeout`
    (504) when a reply does not come, :class:`ServerRefused` with LM Studio's own words.
    """

    def __init__(self, settings: Settings) -> None:
        parts = urlsplit(settings.lmstudio_base_url)
        self._tls = parts.scheme == "https"
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or (443 if self._tls else 80)
        self._attempts = settings.sdk_max_attempts
        self._retry_delay = settings.sdk_retry_delay
        self._token = settings.lmstudio_api_token
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._connecting: dict[str, _Connecting] = {}
        self._client: TokenClient | None = None

    # What can be asked ------------------------------------------------------------------------

    def downloaded(self) -> list[dict[str, Any]]:
        """Every downloaded model as LM Studio describes it (raw: the typed listing of the SDK drops
        fields and fails whole on one unknown ``type`` or ``format``)."""
        return _dicts(self._call("system", "listDownloadedModels"))

    def loaded(self, namespace: str) -> list[dict[str, Any]]:
        """Every loaded instance of a namespace (``llm`` or ``embedding``), raw."""
        return _dicts(self._call(namespace, "listLoaded"))

    def load_config(self, namespace: str, identifier: str) -> list[dict[str, Any]]:
        """The KV fields with which an instance really was loaded."""
        specifier = {"type": "query", "query": {"identifier": identifier}}
        reply = self._call(namespace, "getLoadConfig", {"specifier": specifier})
        return _dicts(reply.get("fields") if isinstance(reply, dict) else None)

    def unload(self, namespace: str, identifier: str) -> None:
        """Unload one instance."""
        self._call(namespace, "unloadModel", {"identifier": identifier}, read_only=False)

    def load(
        self,
        namespace: str,
        model_key: str,
        identifier: str | None,
        ttl_seconds: int | None,
        kv_fields: list[dict[str, Any]],
        on_progress: Callable[[float], None],
    ) -> str:
        """Load a model and return the identifier of the new instance.

        ``ttl_seconds`` None means no TTL. ``on_progress`` gets 0..1. Whatever interrupts the
        waiting (an exception thrown into this greenlet) cancels the load in LM Studio.
        """
        with self._session(namespace) as session:
            types = session._API_TYPES
            endpoint: Any = LoadModelEndpoint(
                model_key,
                identifier,
                ttl_seconds,
                types.REQUEST_NEW_INSTANCE,
                types.MODEL_LOAD_CONFIG,
                None,
                on_progress,
            )
            layer = endpoint.creation_params["loadConfigStack"]["layers"][0]
            layer["config"]["fields"].extend(kv_fields)
            with session._create_channel(endpoint) as channel:
                channel._timeout = LOAD_SILENCE
                try:
                    return str(channel.wait_for_result().identifier)
                except BaseException:
                    cancel_load(session, endpoint, channel)
                    raise

    def connect(self) -> None:
        """Make sure that LM Studio can be reached and lets us in."""
        self._ensure("system")

    def is_connected(self) -> bool:
        """Whether a socket is open already, or opens at the first attempt."""
        try:
            self._ensure("system", attempts=1)
        except GatewayError:
            return False
        return True

    def close(self) -> None:
        """Close every socket; the next call connects anew."""
        if self._client is not None:
            for namespace in NAMESPACES:
                with suppress(Exception):
                    getattr(self._client, namespace).disconnect()

    # How it is asked --------------------------------------------------------------------------

    def _call(
        self,
        namespace: str,
        endpoint: str,
        parameter: dict[str, Any] | None = None,
        *,
        read_only: bool = True,
    ) -> Any:
        """One remote call; a read-only one is repeated once when the socket died under it."""
        argument: Any = None if parameter is None else PlainParameter(parameter)
        try:
            with self._session(namespace) as session:
                return session.remote_call(endpoint, argument)
        except LinkLost:
            if not read_only:
                raise
        with self._session(namespace) as session:
            return session.remote_call(endpoint, argument)

    @contextmanager
    def _session(self, namespace: str) -> Iterator[Any]:
        """A connected session of the SDK; its errors come out as the gateway's."""
        websocket = self._ensure(namespace)
        session = getattr(self._client, namespace)
        try:
            yield session
        except lmstudio.LMStudioWebsocketError:
            self._drop(session, websocket)
            raise LinkLost("The connection to LM Studio was lost.") from None
        except lmstudio.LMStudioTimeoutError:
            # not dropped: another call or load may be alive on the same socket
            raise UpstreamTimeout("LM Studio did not answer in time.") from None
        except lmstudio.LMStudioServerError as error:
            raise ServerRefused(*refusal_words(error)) from None
        except (AssertionError, AttributeError):
            # The SDK's handles become None when the socket dies between our look and its use.
            if session._lmsws is websocket and websocket._httpx_ws is not None:
                raise
            self._drop(session, websocket)
            raise LinkLost("The connection to LM Studio was lost.") from None

    def _ensure(self, namespace: str, attempts: int | None = None) -> Any:
        """The live WebSocket of a namespace; concurrent first users share one connecting."""
        attempts = attempts or self._attempts
        if os.getpid() != self._pid:
            raise RuntimeError("the SDK link crossed a fork; do not use preload_app")
        while True:
            with self._lock:
                websocket = self._live(namespace)
                if websocket is not None:
                    return websocket
                connecting = self._connecting.get(namespace)
                mine = connecting is None
                if connecting is None:
                    connecting = self._connecting[namespace] = _Connecting(attempts)
            if mine:
                self._connect_for_all(namespace, connecting)
            else:
                connecting.done.wait()
            if connecting.error is not None and connecting.attempts >= attempts:
                raise type(connecting.error)(connecting.error.message)

    def _live(self, namespace: str) -> Any:
        """The namespace's WebSocket if it is alive; a dead one is put away first, because the SDK
        never reconnects by itself."""
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
        for attempt in range(1, attempts + 1):
            if attempt > 1:
                gevent.sleep(self._retry_delay)
            try:
                with gevent.Timeout(CONNECT_TIMEOUT, LinkLost("no answer")):
                    self._open(namespace)
                return
            except (LinkLost, lmstudio.LMStudioWebsocketError, OSError) as error:
                logger.info("connection attempt %d to LM Studio failed: %s", attempt, error)
        raise Unreachable(
            f"Failed to connect to LM Studio SDK after {attempts} attempts. "
            "Ensure LM Studio is running and the API server is enabled."
        )

    def _open(self, namespace: str) -> None:
        """Open the session's socket with a URL of ours (the SDK's own is always ``ws://``)."""
        client = self._sdk_client()
        session: Any = getattr(client, namespace)
        scheme = "wss" if self._tls else "ws"
        url = f"{scheme}://{self._address()}:{self._port}/{namespace}"
        websocket = GuardedWebsocket(client._ws_thread, url, client._auth_details)
        session._lmsws = session._resources.enter_context(websocket)

    def _sdk_client(self) -> TokenClient:
        # One client for the life of the process: a second one's loop would never start.
        if self._client is None:
            quieten_sdk()
            ignore_proxies()
            select_on_windows()
            lmstudio.set_sync_api_timeout(CALL_TIMEOUT)
            client_type = type("GatewayClient", (TokenClient,), {"api_token": self._token})
            self._client = client_type(f"{self._host}:{self._port}")
        return self._client

    def _address(self) -> str:
        """The host as an IP literal, resolved now: names resolved inside the SDK's loop can stall
        (gevent issue 2213). With TLS the name stays, the certificate is for it."""
        if self._tls:
            return f"[{self._host}]" if ":" in self._host else self._host
        try:
            ip = ipaddress.ip_address(self._host)
        except ValueError:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            # IPv4 first: LM Studio listens on IPv4, "localhost" often means ::1 first
            found.sort(key=lambda entry: entry[0] != socket.AF_INET)
            ip = ipaddress.ip_address(found[0][4][0])
        return f"[{ip}]" if ip.version == 6 else str(ip)

    def _drop(self, session: Any, websocket: Any) -> None:
        """Put away a session's socket, unless somebody has opened another one meanwhile."""
        with self._lock:
            if session._lmsws is websocket:
                with suppress(Exception):
                    session.disconnect()


#: The link of this process; the design names one module-level connection.
_link: Link | None = None
_link_lock = threading.Lock()


def get_link(settings: Settings) -> Link:
    """The process's link, made on first use (in the worker, after the fork)."""
    global _link
    with _link_lock:
        if _link is None or _link._pid != os.getpid():
            _link = Link(settings)
        return _link


def _dicts(reply: Any) -> list[dict[str, Any]]:
    return [item for item in reply or [] if isinstance(item, dict)]
