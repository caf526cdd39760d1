"""Sends requests to LM Studio's HTTP server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast
from urllib.parse import urlsplit

import gevent
import requests
from requests.structures import CaseInsensitiveDict

from gateway.errors import BadGateway, UpstreamTimeout
from gateway.lmstudio.adapter import LMStudioAdapter
from gateway.lmstudio.exchange import ConnectionBroken, Exchange, ReadTimeout
from gateway.settings import Settings


class Upstream:
    """The HTTP client of one worker, with its pool of connections."""

    def __init__(self, settings: Settings) -> None:
        self.base_url = settings.lmstudio_base_url
        #: ``host:port``, for the ``Host`` header.
        self.authority = urlsplit(self.base_url).netloc
        self.configure(settings)
        self.adapter = LMStudioAdapter(self.base_url)
        self.session = requests.Session()
        self.session.trust_env = False  # LM Studio is local: no proxies, no .netrc
        self.session.mount(self.base_url, self.adapter)

    def configure(self, settings: Settings) -> None:
        """Take another API token, which counts from the next exchange on."""
        token = settings.lmstudio_api_token
        self.authorization = f"Bearer {token}" if token else None

    def exchange(
        self,
        method: str,
        target: str,
        headers: dict[str, str],
        body: bytes | Iterator[bytes] | None,
    ) -> Exchange:
        """Prepare an exchange, which has no connection until its ``send`` is called.

        ``target`` is the path and query exactly as they are sent.
        """
        request = requests.PreparedRequest()
        request.method = method
        request.url = target
        request.headers = cast("CaseInsensitiveDict[str]", headers)
        request.body = cast(Any, body)
        return Exchange(self.adapter, request)

    def greet(self, timeout: float) -> None:
        """Check that LM Studio responds within ``timeout`` seconds; raises a GatewayError."""
        try:
            with gevent.Timeout(timeout, ReadTimeout()):
                headers = {"Host": self.authority, "Connection": "close"}
                exchange = self.exchange("GET", "/lmstudio-greeting", headers, None)
                try:
                    exchange.send()
                    exchange.wait_head(timeout)
                finally:
                    exchange.close()
        except ReadTimeout:
            raise UpstreamTimeout(f"LM Studio did not answer within {timeout:g} s.") from None
        except ConnectionBroken as fault:
            raise BadGateway(f"LM Studio closed the connection: {fault}.") from None
