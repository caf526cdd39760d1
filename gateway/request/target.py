"""What a request's target means here, and where it goes in LM Studio.

:func:`normalize` gives every path one spelling before access is checked, so that no other spelling
of a path dodges the rules of access. :func:`upstream_target` turns the target into LM Studio's,
which stays percent-encoded, so that ``%2F`` inside a model id arrives unchanged. A target that
could mean another path or another host to a server that decodes it once more is rejected.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

from gateway.errors import SHORTHAND, BadRequest, NotFound

_VISIBLE = re.compile(r"[\x21-\x7e]+")
_ABSOLUTE = re.compile(r"[Hh][Tt][Tt][Pp][Ss]?://([^/?#]+)(?=[/?]|\Z)")
#: ``host``, ``host:port`` or the same with an IPv6 address. The empty host and the empty port are
#: valid (RFC 3986 §3.2); a comma in a name is too, but recipients read it as two hosts.
_AUTHORITY = re.compile(
    r"(?:[A-Za-z0-9._~!$&'()*+;=%-]*|\[[0-9A-Fa-f:.]+(?:%[0-9A-Za-z._~-]+)?\])(?::([0-9]{0,5}))?"
)
_SLASHES = re.compile(r"/{2,}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
#: The one path whose trailing slash counts: the page's relative URLs depend on it.
_DASHBOARD = "/debug/"
#: How many layers of percent-encoding a path may have.
MAX_ENCODINGS = 4


def normalize(path: str) -> str:
    """The one spelling of a path: slashes repeated inside it are one, and one at its end is none.

    Two at the beginning stay two: such a path names a host to some clients and is served by none of
    the routes.
    """
    if "//" not in path and not path.endswith("/"):
        return path
    start = "/" if path.startswith("//") else ""
    path = _SLASHES.sub("/", path)
    if path != _DASHBOARD:
        path = path.rstrip("/") or "/"
    return start + path


def origin_form(target: str) -> str | None:
    """The path and query of a target in absolute-form, None if it is malformed.

    Clients of a forward proxy send it. The gateway serves every host alike and ignores the one in
    the target, which replaces ``Host`` (RFC 9112 §3.2.2), but rejects a malformed one.
    """
    found = _ABSOLUTE.match(target)
    if found is None or not is_authority(found[1]):
        return None
    rest = target[found.end() :]
    return rest if rest.startswith("/") else "/" + rest


@lru_cache(maxsize=256)
def is_authority(text: str) -> bool:
    """Whether this is a well-formed ``host`` or ``host:port``, without user information."""
    found = _AUTHORITY.fullmatch(text)
    return found is not None and int(found[1] or 0) < 65536


def upstream_target(environ: dict[str, Any]) -> tuple[str, str]:
    """LM Studio's path for a request, and the same path with the query string.

    Raises BadRequest for a target that tries to escape its prefix, NotFound for a path that the
    proxy does not serve.
    """
    raw = _raw_target(environ)
    path, question, query = raw.partition("?")
    _reject_escapes(path)
    path = normalize(path)
    if path.startswith("/v1/"):
        upstream = path
    elif path in SHORTHAND or path.startswith("/models/"):
        upstream = "/v1" + path
    elif path.startswith("/api/"):
        upstream = path
    else:
        raise NotFound(f"Unknown path: {path}")
    return upstream, upstream + question + query


def _raw_target(environ: dict[str, Any]) -> str:
    """The request target in origin-form, percent-encoded, without its fragment."""
    raw = environ.get("RAW_URI")
    if raw is None:
        raw = quote(environ["PATH_INFO"].encode("latin-1"), safe="/:@!$&'()*+,;=~-._")
        if environ.get("QUERY_STRING"):
            raw += "?" + environ["QUERY_STRING"]
    if not raw.startswith("/"):
        raw = origin_form(raw)
    if raw is None or not _VISIBLE.fullmatch(raw):
        raise _invalid_path()
    return str(raw).partition("#")[0]


def _reject_escapes(path: str) -> None:
    """Reject ``..``, ``//host`` and backslashes in any encoding."""
    decoded = path
    for _ in range(MAX_ENCODINGS):
        if decoded.startswith("//") or "\\" in decoded or _CONTROL.search(decoded):
            raise _invalid_path()
        segments = [segment.partition(";")[0] for segment in decoded.split("/")]
        if "." in segments or ".." in segments:
            raise _invalid_path()
        once_more = unquote(decoded)
        if once_more == decoded:
            return
        decoded = once_more
    raise _invalid_path()


def _invalid_path() -> BadRequest:
    return BadRequest("The request path is not allowed.", code="invalid_path")
