"""The dashboard: one HTML file and the headers that keep a browser from loading anything else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from gateway.errors import Headers


@cache
def page() -> tuple[bytes, Headers]:
    """The HTML and its headers. Nothing in it is secret: what it shows it fetches with a key."""
    content = files("gateway.debug").joinpath("page.html").read_bytes()
    return content, [
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Security-Policy", _policy(content)),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cache-Control", "no-cache"),
    ]


def _policy(content: bytes) -> str:
    """The page's own script and style by their hashes, its own gateway, and nothing else."""
    return "; ".join(
        [
            "default-src 'none'",
            "connect-src 'self'",
            f"script-src {_hashes(rb'<script[^>]*>(.*?)</script>', content)}",
            f"style-src {_hashes(rb'<style>(.*?)</style>', content)}",
            "img-src data:",  # its icon
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        ]
    )


def _hashes(pattern: bytes, content: bytes) -> str:
    digests = (hashlib.sha256(text).digest() for text in re.findall(pattern, content, re.DOTALL))
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
