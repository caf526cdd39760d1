"""Which headers are forwarded, in both directions, and which the gateway writes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from gateway.errors import GatewayError, Headers
from gateway.request.bodies import Body

Environ = dict[str, Any]

#: Request headers that are not forwarded; neither are those that ``Connection`` names. The gateway
#: writes its own ``X-Forwarded-*``.
_NOT_FORWARDED = frozenset(
    {
        "HTTP_HOST",
        "HTTP_AUTHORIZATION",
        "HTTP_X_API_KEY",
        "HTTP_COOKIE",
        "HTTP_EXPECT",
        "HTTP_CONTENT_LENGTH",
        "HTTP_X_REQUEST_ID",
        "HTTP_FORWARDED",
        "HTTP_CONNECTION",
        "HTTP_KEEP_ALIVE",
        "HTTP_PROXY_AUTHENTICATE",
        "HTTP_PROXY_AUTHORIZATION",
        "HTTP_PROXY_CONNECTION",
        "HTTP_TE",
        "HTTP_TRAILER",
        "HTTP_TRANSFER_ENCODING",
        "HTTP_UPGRADE",
    }
)
#: Response headers that are not relayed. The WSGI server writes its own Date and Server.
_NOT_RELAYED = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "date",
        "server",
        "x-request-id",
        "x-content-type-options",
    }
)

#: Keeps a browser from taking a response for something else than its content type says.
NO_SNIFF = ("X-Content-Type-Options", "nosniff")
#: Not relayed either: only the gateway decides which origins may read its responses.
_CORS = "access-control-"
#: Response headers that describe the original body and would be wrong for a replacement.
_ABOUT_BODY = ("content-type", "content-length", "content-encoding", "etag", "last-modified")


# To LM Studio ---------------------------------------------------------------------------------


def to_upstream(
    environ: Environ, body: Body, authority: str, authorization: str | None, *, trusted: bool
) -> dict[str, str]:
    """The headers of the request to LM Studio.

    ``authority`` is LM Studio's ``host:port``; ``trusted`` says whether the peer is a proxy whose
    ``X-Forwarded-*`` headers can be trusted (see :meth:`.Access.trusts_peer`).
    """
    headers = {"Host": authority}
    dropped = _named_in_connection(environ)
    for key, value in environ.items():
        if key.startswith("HTTP_") and key not in _NOT_FORWARDED and key not in dropped:
            name = _wire_name(key)
            if not name.startswith("X-Forwarded-"):
                headers[name] = value
    if environ.get("CONTENT_TYPE"):
        headers["Content-Type"] = environ["CONTENT_TYPE"]
    if isinstance(body, bytes):
        headers["Content-Length"] = str(len(body))
    elif body is not None and environ.get("CONTENT_LENGTH"):
        headers["Content-Length"] = environ["CONTENT_LENGTH"]
    elif body is not None:
        headers["Transfer-Encoding"] = "chunked"
    if authorization is not None:
        headers["Authorization"] = authorization
    _add_forwarded(environ, headers, trusted)
    return headers


def _add_forwarded(environ: Environ, headers: dict[str, str], trusted: bool) -> None:
    """Add ``X-Forwarded-*``: extend those of a trusted proxy and replace those of others."""
    hops = [environ.get("HTTP_X_FORWARDED_FOR") if trusted else "", environ.get("REMOTE_ADDR")]
    proto = environ.get("HTTP_X_FORWARDED_PROTO") if trusted else ""
    host = environ.get("HTTP_X_FORWARDED_HOST") if trusted else ""
    forwarded = {
        "X-Forwarded-For": ", ".join(hop for hop in hops if hop),
        "X-Forwarded-Proto": proto or environ["wsgi.url_scheme"],
        "X-Forwarded-Host": host or environ.get("HTTP_HOST"),
    }
    headers.update((name, value) for name, value in forwarded.items() if value)


def _wire_name(key: str) -> str:
    """``HTTP_X_SOME_NAME`` → ``X-Some-Name``."""
    return _cached_wire_name(key) if len(key) <= 64 else key[5:].replace("_", "-").title()


@lru_cache(maxsize=1024)
def _cached_wire_name(key: str) -> str:
    return key[5:].replace("_", "-").title()


def _named_in_connection(environ: Environ) -> set[str]:
    """The environ keys of the headers that ``Connection`` declares hop-by-hop."""
    named = environ.get("HTTP_CONNECTION", "")
    if not named or named in ("keep-alive", "close"):
        return set()
    return {"HTTP_" + name.strip().upper().replace("-", "_") for name in named.split(",")}


# To the client --------------------------------------------------------------------------------


def to_client(status: int, headers: Headers) -> Headers:
    """LM Studio's response headers without the hop-by-hop ones.

    Errors also get the headers by which the OpenAI SDKs decide whether to retry.
    """
    dropped = set(_NOT_RELAYED)
    for name, value in headers:
        if name.lower() == "connection":
            dropped.update(item.strip().lower() for item in value.split(","))
    kept = without(headers, *dropped)
    kept = [(name, value) for name, value in kept if not name.lower().startswith(_CORS)]
    kept.append(NO_SNIFF)
    if status in (409, 429, 503):
        return _with_retry_advice(status, kept)
    return kept


def with_error(headers: Headers, error: GatewayError) -> Headers:
    """LM Studio's response headers for an error whose body the gateway rewrites."""
    return to_client(error.status, without(headers, *_ABOUT_BODY))


def of_stream(headers: Headers) -> Headers:
    """The headers of an event stream, which proxies must neither buffer nor cache."""
    kept = without(headers, "cache-control", "x-accel-buffering", "content-length")
    return [*kept, ("X-Accel-Buffering", "no"), ("Cache-Control", "no-cache")]


def without(headers: Headers, *names: str) -> Headers:
    """The headers other than those with the given lower-case names."""
    return [(name, value) for name, value in headers if name.lower() not in names]


def _with_retry_advice(status: int, headers: Headers) -> Headers:
    names = {name.lower() for name, _ in headers}
    if status == 409:
        return headers if "x-should-retry" in names else [*headers, ("x-should-retry", "false")]
    return headers if "retry-after" in names else [*headers, ("Retry-After", "5")]
