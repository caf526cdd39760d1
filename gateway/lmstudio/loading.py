"""A load in LM Studio that can be cancelled at any moment of its life."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import gevent
import lmstudio
from lmstudio.json_api import LoadModelEndpoint

from gateway.errors import BadGateway, GatewayError
from gateway.lmstudio.sessions import Sessions

#: The longest silence in seconds during a load. The WebSocket's pings notice a frozen LM Studio
#: sooner.
LOAD_TIMEOUT = 300.0

logger = logging.getLogger(__name__)


class Load:
    """One load of a model in a namespace (``llm`` or ``embedding``).

    :meth:`run` must not be interrupted: a request to load that was sent but whose channel is
    unknown can't be cancelled. Another greenlet calls :meth:`cancel` instead.
    """

    def __init__(
        self,
        sessions: Sessions,
        namespace: str,
        on_progress: Callable[[float], None],
        unload: Callable[[str], None],
    ) -> None:
        self._sessions = sessions
        self._namespace = namespace
        self._on_progress = on_progress
        self._unload = unload
        self._progress = -1.0
        self._channel: Any = None
        self._identifier: str | None = None
        self._cancelled = False

    def run(
        self,
        model_key: str,
        identifier: str | None,
        ttl_seconds: int | None,
        kv_fields: list[dict[str, Any]],
    ) -> str:
        """Load a model and return the identifier of the new instance."""
        with self._sessions.session(self._namespace) as session:
            if self._cancelled:
                raise gevent.GreenletExit
            types = session._API_TYPES
            endpoint: Any = LoadModelEndpoint(
                model_key,
                identifier,
                ttl_seconds,
                types.REQUEST_NEW_INSTANCE,
                types.MODEL_LOAD_CONFIG,
                None,
                None,
            )
            layer = endpoint.creation_params["loadConfigStack"]["layers"][0]
            layer["config"]["fields"].extend(kv_fields)
            with session._create_channel(endpoint) as channel:
                channel._timeout = LOAD_TIMEOUT
                self._channel = channel
                if self._cancelled:
                    self._send_cancel()
                try:
                    self._identifier = self._follow(channel)
                    loaded_in_vain = self._cancelled  # from here on, cancel() unloads it
                except (lmstudio.LMStudioServerError, lmstudio.LMStudioWebsocketError, BadGateway):
                    raise
                except BaseException:
                    self._send_cancel()  # LM Studio goes on loading after a timeout
                    raise
                finally:
                    self._channel = None
        if loaded_in_vain:
            self._unload_again()
        return self._identifier

    def cancel(self) -> None:
        """Cancel the load in LM Studio, or unload the instance if it has just been loaded.

        Does nothing after a failure.
        """
        self._cancelled = True
        if self._identifier is not None:
            self._unload_again()
        elif self._channel is not None:
            self._send_cancel()

    def _follow(self, channel: Any) -> str:
        """Follow the messages of the load's channel, up to the one that ends it."""
        for message in channel.rx_stream():
            match message:
                case {"type": "progress" | "loadProgress", "progress": progress}:
                    self._report(progress)
                case {
                    "type": "success" | "alreadyLoaded" | "loadSuccess",
                    "info": {"identifier": str(identifier)},
                }:
                    self._report(1.0)
                    return identifier
        raise BadGateway("LM Studio ended the load without saying that it succeeded.")

    def _report(self, progress: Any) -> None:
        """Report progress from 0 to 1 that increases; LM Studio's numbers are not trusted."""
        if isinstance(progress, bool) or not isinstance(progress, int | float):
            return
        if math.isnan(progress) or self._cancelled:
            return
        progress = min(max(float(progress), 0.0), 1.0)
        if progress > self._progress:
            self._progress = progress
            self._on_progress(progress)

    def _send_cancel(self) -> None:
        try:
            self._channel.cancel()
        except Exception as error:  # the connection is lost, in one of the SDK's many ways
            logger.debug("a load could not be cancelled: %r", error)

    def _unload_again(self) -> None:
        assert self._identifier is not None
        try:
            self._unload(self._identifier)
        except GatewayError as error:
            logger.warning(
                "%s was loaded for a client that disconnected and could not be unloaded: %s",
                self._identifier,
                error.message,
            )
