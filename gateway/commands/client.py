"""An HTTP client of a running gateway: its address, its key, its responses and its events.

The commands send all their requests through a :class:`Remote`.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests

from gateway.settings import SettingsError, parse_keys, read_env_file

#: Seconds to connect, and seconds without a byte. A stream has a comment every 10 or 15 s; a plain
#: response may have to wait while the gateway tries to connect to LM Studio.
CONNECT_TIMEOUT = 10.0
RESPONSE_TIMEOUT = 120.0
STREAM_TIMEOUT = 60.0
#: Seconds between attempts to reconnect to the event stream, as its ``retry:`` asks for.
RECONNECT_SECONDS = 3.0

_EVERY_ADDRESS = ("0.0.0.0", "::")


class RemoteError(Exception):
    """A command failed: the text says why, and :attr:`exit_status` is for scripts."""

    exit_status = 1


class BadUsage(RemoteError):
    """An invalid URL or key."""

    exit_status = 2


class Unreachable(RemoteError):
    """No gateway responds, or it closed the connection before its response was complete."""

    exit_status = 3


class ErrorResponse(RemoteError):
    """The gateway responded with an error. ``status`` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.exit_status = 4 if status in (401, 403) else 1


class Event(NamedTuple):
    """One server-sent event; ``data`` is the gateway's JSON, unparsed."""

    id: str
    name: str
    data: str


class Remote:
    """One gateway. Its methods raise :class:`Unreachable` and :class:`ErrorResponse`."""

    def __init__(self, url: str | None = None, key: str | None = None) -> None:
        """``url`` and ``key``, if given, override the environment and ``.env``."""
        try:
            from_file = read_env_file()
        except SettingsError as error:
            raise BadUsage(str(error)) from None
        self.url = _checked_url(url or _default_url(from_file))
        self._http = requests.Session()
        # not in Authorization, which a ~/.netrc would replace
        secret = key or _default_key(from_file)
        if not re.fullmatch(r"[\x21-\x7e]*", secret):
            raise BadUsage("--key: a key may contain only visible ASCII characters")
        if secret:
            self._http.headers["X-API-Key"] = secret

    def get(self, path: str) -> bytes:
        """Return the JSON at a path, unparsed."""
        return self._json("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """Post a body and return the JSON of the response, unparsed."""
        return self._json("POST", path, json=body)

    @contextmanager
    def stream(self, method: str, path: str, **options: Any) -> Iterator[Iterator[Event]]:
        """The events of a streamed response.

        Leaving the block closes the connection, which cancels the operation in the gateway.
        """
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
        headers |= options.pop("headers", {})
        timeout = (CONNECT_TIMEOUT, STREAM_TIMEOUT)
        with self._ask(
            method, path, headers=headers, stream=True, timeout=timeout, **options
        ) as response:
            _expect(response, "text/event-stream")
            yield self._read(response)

    def follow(self, types: str, report: Callable[[str], None]) -> Iterator[Event]:
        """Yield the events of ``/debug/stream`` forever, across lost connections.

        ``report`` gets a message when the connection is lost and when it is back. Raises only if
        the stream never began or the key is no longer accepted.
        """
        query = {"types": types} if types else {}
        last_id = ""
        began = lost = False
        while True:
            resume = {"Last-Event-ID": last_id} if last_id else {}
            try:
                with self.stream("GET", "/debug/stream", params=query, headers=resume) as events:
                    if lost:
                        report(f"Reconnected; continuing after event {last_id}.")
                    began, lost = True, False
                    for event in events:
                        last_id = event.id or last_id
                        yield event
                why = "The gateway ended the event stream."
            except Unreachable as error:
                if not began:
                    raise
                why = str(error)
            except ErrorResponse as error:
                # a reverse proxy may respond for a gateway that is restarting
                if not began or error.status not in (502, 503, 504):
                    raise
                why = str(error)
            if not lost:
                report(f"{why} Reconnecting …")
            lost = True
            time.sleep(RECONNECT_SECONDS)

    def _json(self, method: str, path: str, **options: Any) -> bytes:
        timeout = (CONNECT_TIMEOUT, RESPONSE_TIMEOUT)
        with self._ask(method, path, timeout=timeout, **options) as response:
            _expect(response, "application/json")
            return response.content

    def _ask(self, method: str, path: str, **options: Any) -> requests.Response:
        try:
            # a redirect would turn a POST into a GET, and could send the key to another host
            return self._http.request(method, self.url + path, allow_redirects=False, **options)
        except (requests.RequestException, OSError) as error:  # OSError: a missing CA file
            raise self._unreachable(error) from None

    def _read(self, response: requests.Response) -> Iterator[Event]:
        try:
            yield from read_events(response.iter_lines())
        except (requests.RequestException, OSError) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: BaseException) -> Unreachable:
        cause = _cause(error)
        if "CERTIFICATE_VERIFY_FAILED" in cause:
            cause += " (for a private CA, set REQUESTS_CA_BUNDLE to its file)"
        message = f"The gateway at {self.url} can't be reached: {cause}."
        if "refused" in cause:
            message += " Is it running, and is this its address (GATEWAY_URL or --url)?"
        return Unreachable(message)


def read_events(lines: Iterable[bytes]) -> Iterator[Event]:
    """The events in the lines of a ``text/event-stream``, each with one line of data."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.decode("utf-8", "replace").partition(":")
        if name:
            fields[name] = value.removeprefix(" ")
        elif not line:
            if "data" in fields:
                yield Event(fields.get("id", ""), fields.get("event", ""), fields["data"])
            fields = {}


def error_response(status: int, body: dict[str, Any], request_id: str = "") -> ErrorResponse:
    """The gateway's own message for an error, with its details and request id."""
    error = body.get("error")
    message = str(error.get("message") if isinstance(error, dict) else error)
    origin = [str(status)]
    if request_id or body.get("requestId"):
        origin.append(f"request {body.get('requestId') or request_id}")
    lines = [f"{message} ({', '.join(origin)})"]
    for detail in body.get("details") or []:
        lines.append(f"  {'.'.join(map(str, detail['path']))}: {detail['message']}")
    return ErrorResponse(status, "\n".join(lines))


def _expect(response: requests.Response, content_type: str) -> None:
    """Raise ErrorResponse unless the response is a 200 of this content type."""
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    what = f"{response.status_code} {response.reason or ''}".strip()
    if response.is_redirect:
        what += f", a redirect to {response.headers['Location']} that is not followed"
    elif response.status_code != 200:
        body = _members(response)
        if body.get("error"):
            raise error_response(
                response.status_code, body, response.headers.get("X-Request-Id", "")
            )
    elif kind == content_type:
        # LM Studio itself responds like this to unknown paths
        if kind != "application/json" or _members(response).keys() - {"error"}:
            return
        what = response.text
    raise ErrorResponse(response.status_code, f"This is not a gateway's response: {what}.")


def _members(response: requests.Response) -> dict[str, Any]:
    """The JSON object in the body of a response, or an empty one."""
    try:
        content = json.loads(response.content)
    except (ValueError, RecursionError, requests.RequestException):
        return {}
    return content if isinstance(content, dict) else {}


def _checked_url(url: str) -> str:
    """The gateway's root URL, without a trailing ``/`` or the ``/v1`` that SDKs need."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        requests.Request("GET", url).prepare()
    except ValueError:  # requests' own errors for URLs are ValueErrors too
        valid = False
    if not valid or parts.query or parts.fragment:
        raise BadUsage("The gateway's URL is not valid (example: http://192.168.1.10:8002).")
    if "@" in parts.netloc:
        raise BadUsage("The gateway's URL must not contain user:password@; use GATEWAY_API_KEY.")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _default_url(from_file: dict[str, str]) -> str:
    """``GATEWAY_URL``, else the address of a gateway on this machine with these settings."""
    settings = {**from_file, **os.environ}
    if settings.get("GATEWAY_URL"):
        return settings["GATEWAY_URL"].strip()
    host = settings.get("GATEWAY_HOST") or "127.0.0.1"
    if host in _EVERY_ADDRESS or host.startswith("unix:"):
        host = "127.0.0.1"
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{settings.get('GATEWAY_PORT') or 8002}"


def _default_key(from_file: dict[str, str]) -> str:
    """The first admin key, else the first key, from the environment or else from ``.env``."""
    for source in (os.environ, from_file):
        for variable in ("GATEWAY_ADMIN_KEY", "GATEWAY_API_KEY"):
            try:
                keys = parse_keys(source.get(variable, ""))
            except ValueError as error:
                raise BadUsage(f"{variable}: {error}") from None
            if keys:
                return keys[0].secret
    return ""


def _cause(error: BaseException) -> str:
    """The innermost cause: the messages of the outer ones only repeat it."""
    while True:
        inner = getattr(error, "reason", None) or (error.args[-1] if error.args else None)
        if not isinstance(inner, BaseException):
            return re.sub(r"^HTTPS?Connection(Pool)?\(.*?\): ", "", str(error)).rstrip(".")
        error = inner
