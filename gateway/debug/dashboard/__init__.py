"""The dashboard: an HTML page that shows live what the gateway is doing, and manages its models.

The sources are ``index.html``, ``style.css`` and the modules in ``scripts``; ``scripts/main.mjs``
is the entry point and the file to read first. :mod:`.assembly` combines them into one file, which
loads nothing else. There is no build step and no third-party JavaScript.

The page uses nothing but the gateway's HTTP API. This package must not know about Flask: it
provides the page and its headers, and the ``debug`` blueprint serves them.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from gateway.debug.dashboard.assembly import Page, assemble
from gateway.errors import Headers

__all__ = ["dashboard"]


@cache
def dashboard() -> tuple[bytes, Headers]:
    """The page and its headers, assembled on the first call.

    The page contains no secrets: it asks the user for a key and requests all its data with that.
    """
    page = assemble(files(__name__))
    return page.html.encode(), [
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Security-Policy", _policy(page)),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cache-Control", "no-cache"),
    ]


def _policy(page: Page) -> str:
    """Allow the inline script and style, by their hashes, and requests to this gateway."""
    return "; ".join(
        [
            "default-src 'none'",
            "connect-src 'self'",
            f"script-src {_hash(page.script)}",
            f"style-src {_hash(page.style)}",
            "img-src data:",  # the icon
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        ]
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
