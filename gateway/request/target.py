"""Where a request goes in LM Studio: turns the client's request target into the upstream's.

The target stays percent-encoded, so that ``%2F`` inside a model id arrives unchanged. A target that
could mean another path or another host to a server that decodes it once more is rejected.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, unquote

from gateway.errors import SHORTHAND, BadRequest, NotFound

_VISIBLE = re.compile(r"[\x21-\x7e]+")
_ABSOLUTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
#: How many layers of percent-encoding a path may have.
MAX_ENCODINGS = 4


def upstream_target(environ: dict[str, Any]) -> tuple[str, str]:
    """LM Studio's path for a request, and the same path with the query string.

    Raises BadRequest for a target that tries to escape its prefix, NotFound for a path that the
    proxy does not serve.
    """
    raw = _raw_target(environ)
    path, question, query = raw.partition("?")
    _reject_escapes(path)
    if path.startswith("/v1/") and path != "/v1/":
        upstream = path
    elif path in SHORTHAND or path.startswith("/models/"):
        upstream = "/v1" + path
    elif path.startswith("/api/") and path != "/api/":
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
        # absolute-form, as clients of a forward proxy send it: the gateway ignores its host
        raw = _ABSOLUTE.sub("", raw, count=1) or "/"
    if not _VISIBLE.fullmatch(raw) or not raw.startswith("/"):
        raise _invalid_path()
    return str(raw).partition("#")[0]


def _reject_escapes(path: str) -> None:
    """Reject ``..``, ``//host`` and backslashes in any encoding."""
    decoded = path
    for _ in range(MAX_ENCODINGS):
        if decoded.startswith("//") or "\\" in decoded or re.search(r"[\x00-\x1f\x7f]", decoded):
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
