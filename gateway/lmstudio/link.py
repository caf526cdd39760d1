"""LM Studio's management API: the calls that list, load and unload models.

The official SDK speaks LM Studio's WebSocket protocol, :class:`.sessions.Sessions` keeps it
connected. This module makes the calls, and the loads that can be cancelled.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from gevent.pool import Group

from gateway.errors import GatewayError
from gateway.lmstudio.apart import apart
from gateway.lmstudio.loading import Load
from gateway.lmstudio.sdk import LinkLost, PlainParameter
from gateway.lmstudio.sessions import Sessions
from gateway.settings import Settings

#: Seconds that cancelling loads may take when the process ends.
CANCEL_TIMEOUT = 1.0


class Link:
    """LM Studio's management API for one worker process.

    Methods raise :class:`.Unreachable` (503) when LM Studio can't be connected to,
    :class:`.UpstreamTimeout` (504) when it does not reply, and :class:`.ServerRefused` with LM
    Studio's own message when it replies with an error.
    """

    def __init__(self, settings: Settings) -> None:
        #: Called for whatever a lost LM Studio would explain.
        self.on_trouble: Callable[[], None] = lambda: None
        self._sessions = Sessions(settings, lambda: self.on_trouble())
        self._cancelling = Group()
        self._pid = os.getpid()

    def configure(self, settings: Settings) -> None:
        """Take other settings, which count from the next connection on."""
        self._sessions.configure(settings)

    def downloaded(self) -> list[dict[str, Any]]:
        """Return every downloaded model, as the dicts that LM Studio sends.

        The SDK's typed listing drops fields, and one unknown ``type`` or ``format`` makes it fail.
        """
        return _dicts(self._call("system", "listDownloadedModels"))

    def loaded(self, namespace: str) -> list[dict[str, Any]]:
        """Return every loaded instance of a namespace (``llm`` or ``embedding``), also as dicts."""
        return _dicts(self._call(namespace, "listLoaded"))

    def load_config(self, namespace: str, identifier: str) -> list[dict[str, Any]]:
        """Return the KV fields with which an instance was loaded, as LM Studio reports them."""
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

        Without ``ttl_seconds`` the instance has no TTL. ``on_progress`` is called with 0 to 1. An
        exception that interrupts the wait (a killed greenlet, say) cancels the load in LM Studio.
        """
        load = Load(
            self._sessions,
            namespace,
            on_progress,
            lambda identifier: self.unload(namespace, identifier),
        )
        try:
            return apart(load.run, model_key, identifier, ttl_seconds, kv_fields)
        except BaseException:
            self._cancelling.spawn(load.cancel)
            raise

    def connect(self) -> None:
        """Connect to LM Studio if not yet connected; checks that it runs and accepts the token."""
        apart(self._sessions.connect, "system")

    def is_connected(self) -> bool:
        """Whether LM Studio is connected, or a first attempt to connect succeeds."""
        try:
            apart(self._sessions.connect, "system", attempts=1)
        except GatewayError:
            return False
        return True

    def finish_cancelling(self) -> None:
        """Wait until the loads that are being cancelled are, or for :data:`CANCEL_TIMEOUT`."""
        self._cancelling.join(CANCEL_TIMEOUT)

    def close(self) -> None:
        """Close every connection; the next call connects again."""
        self._sessions.close()

    def _call(
        self,
        namespace: str,
        endpoint: str,
        parameter: dict[str, Any] | None = None,
        *,
        read_only: bool = True,
    ) -> Any:
        """Make one remote call. A read-only one is retried once if the connection is lost."""
        argument: Any = None if parameter is None else PlainParameter(parameter)
        try:
            return apart(self._call_once, namespace, endpoint, argument)
        except LinkLost:
            if not read_only:
                raise
        return apart(self._call_once, namespace, endpoint, argument)

    def _call_once(self, namespace: str, endpoint: str, argument: Any) -> Any:
        with self._sessions.session(namespace) as session:
            return session.remote_call(endpoint, argument)


#: The link of this process: the one connection that every caller in it shares.
_link: Link | None = None
_link_lock = threading.Lock()


def get_link(settings: Settings) -> Link:
    """Return the link of this process, made on first use: in the worker, after the fork."""
    global _link
    with _link_lock:
        if _link is None or _link._pid != os.getpid():
            _link = Link(settings)
        return _link


def _dicts(reply: Any) -> list[dict[str, Any]]:
    """The dicts of a list; LM Studio may send something else."""
    return [item for item in reply if isinstance(item, dict)] if isinstance(reply, list) else []
