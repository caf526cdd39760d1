"""Reads the body of a request, whole or piece by piece, within its limits of size and time.

Works on the WSGI environ; whatever a WSGI server raises while it reads becomes a BadRequest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gateway.errors import BadRequest, BodyTooLarge, GatewayError, RequestTimeout
from gateway.request.budget import Share

Environ = dict[str, Any]
#: A request's body: whole, piece by piece, or none.
Body = bytes | Iterator[bytes] | None

_READ_BYTES = 65536


def check_length(environ: Environ, limit: int) -> None:
    """Raise BodyTooLarge if ``Content-Length`` announces more than ``limit`` bytes."""
    length = environ.get("CONTENT_LENGTH") or "0"
    if length.isdigit() and int(length) > limit:
        raise too_large(limit)


def read_body(environ: Environ, limit: int, share: Share | None = None) -> bytes:
    """Read the whole request body, whose bytes are taken from ``share``.

    Raises BodyTooLarge, RequestTimeout, Overloaded if the share can't be had, or BadRequest if the
    body is incomplete or malformed.
    """
    check_length(environ, limit)
    if share is None:
        return b"".join(_pieces(environ, limit))
    # Announcing a body holds nothing, else a few idle clients could take the whole budget.
    share.check(_announced(environ) or 0)
    pieces = []
    for piece in _pieces(environ, limit):
        share.take(len(piece))
        pieces.append(piece)
    return b"".join(pieces)


def stream_body(environ: Environ, limit: int) -> Body:
    """The request body piece by piece, None if there is none. Iterating raises like
    :func:`read_body`."""
    length = environ.get("CONTENT_LENGTH") or ""
    chunked = "HTTP_TRANSFER_ENCODING" in environ
    if not chunked and length in ("", "0"):
        return None if not length else b""
    return _pieces(environ, limit)


def too_large(limit: int) -> BodyTooLarge:
    """The error for a body of more than ``limit`` bytes."""
    return BodyTooLarge(f"The request body is larger than {limit} bytes.")


def _pieces(environ: Environ, limit: int) -> Iterator[bytes]:
    check_length(environ, limit)
    source = environ["wsgi.input"]
    size = 0
    expected = _announced(environ)
    while expected is None or size < expected:
        wanted = _READ_BYTES if expected is None else min(_READ_BYTES, expected - size)
        try:
            piece = source.read(wanted)
        except GatewayError:
            raise
        except TimeoutError:
            raise RequestTimeout("The request body arrived too slowly.") from None
        except Exception as fault:
            # each WSGI server has its own exceptions for an incomplete or malformed body
            kind = type(fault).__name__
            raise BadRequest(f"The request body can't be read: {kind}.") from None
        if not piece:
            break
        size += len(piece)
        if size > limit:
            raise too_large(limit)
        yield piece
    if expected is not None and size < expected:
        raise BadRequest("The request body is incomplete.")


def _announced(environ: Environ) -> int | None:
    """The length that ``Content-Length`` announces, None if there is none."""
    length = environ.get("CONTENT_LENGTH")
    return int(length) if length and length.isdigit() else None
