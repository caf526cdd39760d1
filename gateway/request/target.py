"""Where a request goes in LM Studio: from the request target as it came to the one sent on.

The target is taken raw, so that ``%2F`` inside a model id arrives as it came, and is refused when
it could mean another path or another host to anybody who decodes it again.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, unquote

from gateway.errors import SHORTHAND, BadRequest, NotFound

_VISIBLE = re.compile(r"[\x21-\x7e]+")
_ABSOLUTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
#: How often a path may be percent-encoded in itself before it is refused.
MAX_ENCODINGS = 4


def upstream_target(environ: dict[str, Any]) -> tuple[str, str]:
    """LM Studio's path for a request, and the same with the query string.

    Raises BadRequest for a target that tries to leave its place, NotFound for a path that is none
    of the proxy's.
    """
    raw = _raw_target(environ)
    path, question, query = raw.partition("?")
    _refuse_escapes(path)
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
    raw = environ.get("RAW_URI")
    if raw is None:
        raw = quote(environ["PATH_INFO"].encode("latin-1"), safe="/:@!$&'()*+,;=~-._")
        if environ.get("QUERY_STRING"):
            raw += "?" + environ["QUERY_STRING"]
    if not raw.startswith("/"):
        # absolute-form, as a client of a forward proxy sends it: its host means nothing here
        raw = _ABSOLUTE.sub("", raw, count=1) or "/"
    if not _VISIBLE.fullmatch(raw) or not raw.startswith("/"):
        raise _refused()
    return str(raw).partition("#")[0]


def _refuse_escapes(path: str) -> None:
    """Refuse ``..``, ``//host`` and backslashes in any encoding."""
    decoded = path
    for _ in range(MAX_ENCODINGS):
        if decoded.startswith("//") or "\\" in decoded or re.search(r"[\x00-\x1f\x7f]", decoded):
            raise _refused()
        segments = [segment.partition(";")[0] for segment in decoded.split("/")]
        if "." in segments or ".." in segments:
            raise _refused()
        again = unquote(decoded)
        if again == decoded:
            return
        decoded = again
    raise _refused()


def _refused() -> BadRequest:
    return BadRequest("The request's path is not acceptable.", code="invalid_path")
