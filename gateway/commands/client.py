"""The gateway as seen from any machine of the LAN: where it is, with which key, and how it answers.

What :mod:`gateway.commands` asks over HTTP goes through :class:`Remote`.
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
#: answer may have to wait for attempts at connecting to LM Studio.
CONNECT_TIMEOUT = 10.0
ANSWER_TIMEOUT = 120.0
STREAM_TIMEOUT = 60.0
#: Seconds between attempts to get the event stream back, as its own ``retry:`` asks for.
RECONNECT_SECONDS = 3.0

_EVERY_ADDRESS = ("0.0.0.0", "::")


class RemoteError(Exception):
    """A command can't do what it should; the text says why, :attr:`exit_status` is for scripts."""

    exit_status = 1


class BadUsage(RemoteError):
    """A URL or a key that can't be one."""

    exit_status = 2


class NotReachable(RemoteError):
    """No gateway answers, or it went away before its answer was complete."""

    exit_status = 3


class Refused(RemoteError):
    """The gateway answered with an error. ``status`` is the HTTP status."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status
        self.exit_status = 4 if status in (401, 403) else 1


class Event(NamedTuple):
    """One server-sent event; ``data`` is the gateway's JSON as it came."""

    id: str
    name: str
    data: str


class Remote:
    """One gateway. Its methods raise :class:`NotReachable` and :class:`Refused`."""

    def __init__(self, url: str | None = None, key: str | None = None) -> None:
        """``url`` and ``key`` of the command line; else the environment and ``.env`` say."""
        try:
            from_file = read_env_file()
        except SettingsError as error:
            raise BadUsage(str(error)) from None
        self.url = _checked_url(url or _default_url(from_file))
        self._http = requests.Session()
        # not in Authorization: a ~/.netrc would replace it there
        secret = key or _default_key(from_file)
        if not re.fullmatch(r"[\x21-\x7e]*", secret):
            raise BadUsage("--key: a key is one or more visible ASCII characters")
        if secret:
            self._http.headers["X-API-Key"] = secret

    def get(self, path: str) -> bytes:
        """The JSON at a path, as it came."""
        return self._json("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """The JSON that answers a body, as it came."""
        return self._json("POST", path, json=body)

    @contextmanager
    def stream(self, method: str, path: str, **options: Any) -> Iterator[Iterator[Event]]:
        """The events of a streamed answer. Leaving the block closes the connection, by which the
        gateway learns that nobody waits any longer."""
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
        headers |= options.pop("headers", {})
        timeout = (CONNECT_TIMEOUT, STREAM_TIMEOUT)
        with self._ask(
            method, path, headers=headers, stream=True, timeout=timeout, **options
        ) as answer:
            _expect(answer, "text/event-stream")
            yield self._read(answer)

    def follow(self, types: str, tell: Callable[[str], None]) -> Iterator[Event]:
        """``/debug/stream`` without an end: after a drop it goes on where it ended. ``tell`` hears
        of drops. Raises only when the stream never began, or may no longer be read."""
        query = {"types": types} if types else {}
        last_id = ""
        began = lost = False
        while True:
            resume = {"Last-Event-ID": last_id} if last_id else {}
            try:
                with self.stream("GET", "/debug/stream", params=query, headers=resume) as events:
                    if lost:
                        tell(f"Connected again; going on behind event {last_id}.")
                    began, lost = True, False
                    for event in events:
                        last_id = event.id or last_id
                        yield event
                why = "The gateway ended the event stream."
            except NotReachable as error:
                if not began:
                    raise
                why = str(error)
            except Refused as error:
                # a front may answer for a gateway that restarts
                if not began or error.status not in (502, 503, 504):
                    raise
                why = str(error)
            if not lost:
                tell(f"{why} Trying to connect again …")
            lost = True
            time.sleep(RECONNECT_SECONDS)

    def _json(self, method: str, path: str, **options: Any) -> bytes:
        timeout = (CONNECT_TIMEOUT, ANSWER_TIMEOUT)
        with self._ask(method, path, timeout=timeout, **options) as answer:
            _expect(answer, "application/json")
            return answer.content

    def _ask(self, method: str, path: str, **options: Any) -> requests.Response:
        try:
            # a redirect would make a POST a GET, and take the key to who knows where
            return self._http.request(method, self.url + path, allow_redirects=False, **options)
        except (requests.RequestException, OSError) as error:  # OSError: a missing CA file
            raise self._not_reachable(error) from None

    def _read(self, answer: requests.Response) -> Iterator[Event]:
        try:
            yield from read_events(answer.iter_lines())
        except (requests.RequestException, OSError) as error:
            raise self._not_reachable(error) from None

    def _not_reachable(self, error: BaseException) -> NotReachable:
        cause = _cause(error)
        if "CERTIFICATE_VERIFY_FAILED" in cause:
            cause += " (REQUESTS_CA_BUNDLE names the file of a private CA)"
        words = f"The gateway at {self.url} can't be reached: {cause}."
        if "refused" in cause:
            words += " Is it running, and there (GATEWAY_URL or --url)?"
        return NotReachable(words)


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


def refusal(status: int, told: dict[str, Any], request_id: str = "") -> Refused:
    """An error of the gateway's in its own words, with details and request id."""
    error = told.get("error")
    words = str(error.get("message") if isinstance(error, dict) else error)
    names = [str(status)]
    if request_id or told.get("requestId"):
        names.append(f"request {told.get('requestId') or request_id}")
    lines = [f"{words} ({', '.join(names)})"]
    for detail in told.get("details") or []:
        lines.append(f"  {'.'.join(map(str, detail['path']))}: {detail['message']}")
    return Refused(status, "\n".join(lines))


def _expect(answer: requests.Response, content_type: str) -> None:
    """Raise Refused unless the answer is a success in this form."""
    kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    what = f"{answer.status_code} {answer.reason or ''}".strip()
    if answer.is_redirect:
        what += f", a redirect to {answer.headers['Location']} that is not followed"
    elif answer.status_code != 200:
        told = _members(answer)
        if told.get("error"):
            raise refusal(answer.status_code, told, answer.headers.get("X-Request-Id", ""))
    elif kind == content_type:
        # LM Studio itself answers like this to what it does not know
        if kind != "application/json" or _members(answer).keys() - {"error"}:
            return
        what = answer.text
    raise Refused(answer.status_code, f"This is no answer of a gateway: {what}.")


def _members(answer: requests.Response) -> dict[str, Any]:
    """The answer's JSON object; without one, empty."""
    try:
        told = json.loads(answer.content)
    except (ValueError, RecursionError, requests.RequestException):
        return {}
    return told if isinstance(told, dict) else {}


def _checked_url(url: str) -> str:
    """The gateway's root: without a trailing ``/`` and, as other clients want it, ``/v1``."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        requests.Request("GET", url).prepare()
    except ValueError:  # requests' own errors for URLs are ValueErrors too
        fits = False
    if not fits or parts.query or parts.fragment:
        raise BadUsage("The gateway's URL is not one (example: http://192.168.1.10:8002).")
    if "@" in parts.netloc:
        raise BadUsage("The gateway's URL must not contain user:password@; use GATEWAY_API_KEY.")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _default_url(from_file: dict[str, str]) -> str:
    """``GATEWAY_URL``, else where a gateway with these settings listens on this machine."""
    settings = {**from_file, **os.environ}
    if settings.get("GATEWAY_URL"):
        return settings["GATEWAY_URL"].strip()
    host = settings.get("GATEWAY_HOST") or "127.0.0.1"
    if host in _EVERY_ADDRESS or host.startswith("unix:"):
        host = "127.0.0.1"
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{settings.get('GATEWAY_PORT') or 8002}"


def _default_key(from_file: dict[str, str]) -> str:
    """The first admin key, else the first key: of the environment, else of ``.env``."""
    for source in (os.environ, from_file):
        for variable in ("GATEWAY_ADMIN_KEY", "GATEWAY_API_KEY"):
            try:
                keys = parse_keys(source.get(variable, ""))
            except ValueError as fault:
                raise BadUsage(f"{variable}: {fault}") from None
            if keys:
                return keys[0].secret
    return ""


def _cause(error: BaseException) -> str:
    """The innermost cause: the texts of the outer ones are representations of each other."""
    while True:
        inner = getattr(error, "reason", None) or (error.args[-1] if error.args else None)
        if not isinstance(inner, BaseException):
            return re.sub(r"^HTTPS?Connection(Pool)?\(.*?\): ", "", str(error)).rstrip(".")
        error = inner
