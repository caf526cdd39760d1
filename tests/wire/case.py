"""A case of the corpus: what a client sends, byte by byte, and what must happen.

A file in ``cases/`` begins with fields, each a line ``name: value``::

    why: what the case shows
    gateway: keyed (default), open, admin-only, guarded, allowlist or proxied; see test_corpus.py
    status: the expected responses in order: ``400``, ``200 401``, or with alternatives
            ``400|closed``. ``closed`` is a connection that closes without a response, ``waits`` one
            that stays open without one, ``headless`` a response as in HTTP/0.9, a body alone
    behind-nginx: ``same`` (default), or the responses through nginx, written like ``status``
    upstream: the number of requests that reach LM Studio, or ``any``
    contains: a text that the last response must contain; may be repeated
    lacks: a text that no response and no request to LM Studio may contain; may be repeated
    lacks-directly: the same, but only without nginx, which forwards it
    end: ``keep`` (default) or ``close``: what the client does with its half of the connection after
         its last byte

The bytes follow after a line ``---``. Line breaks of the file are ignored; ``\\r``, ``\\n``,
``\\t``, ``\\\\`` and ``\\xHH`` are bytes; ``{{9000*a}}`` is 9000 times ``a``, where a ``}`` is
written ``\\x7d``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "cases"
_ESCAPE = re.compile(rb"\\(r|n|t|\\|x[0-9a-f]{2})")
_REPEAT = re.compile(rb"\{\{(\d+)\*(.*?)\}\}", re.DOTALL)
_PLAIN = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"\\": b"\\"}
_FIELDS = {"why", "gateway", "status", "behind-nginx", "upstream", "contains", "lacks",
           "lacks-directly", "end"}  # fmt: skip

#: The expected responses in order; each is a set of acceptable statuses.
Expected = tuple[frozenset[str], ...]


@dataclass(frozen=True)
class Case:
    """A parsed file of ``cases/``."""

    name: str
    gateway: str
    status: Expected
    nginx: Expected
    upstream: int | None
    contains: tuple[str, ...]
    lacks: tuple[str, ...]
    lacks_directly: tuple[str, ...]
    closes: bool
    data: bytes


def load() -> list[Case]:
    """All cases, sorted by name."""
    return [_read(path) for path in sorted(FOLDER.glob("*.txt"))]


def _read(path: Path) -> Case:
    head, separator, text = path.read_text().partition("\n---\n")
    assert separator, f"{path}: no line with ---"
    fields: dict[str, list[str]] = {}
    for line in head.splitlines():
        name, colon, value = line.partition(": ")
        assert colon, f"{path}: {line}"
        assert name in _FIELDS, f"{path}: {name}"
        fields.setdefault(name, []).append(value)
    assert fields.get("why"), f"{path}: no why"
    status = _expected(fields["status"][0])
    nginx = fields.get("behind-nginx", ["same"])[0]
    upstream = fields["upstream"][0]
    return Case(
        name=path.stem,
        gateway=fields.get("gateway", ["keyed"])[0],
        status=status,
        nginx=status if nginx == "same" else _expected(nginx),
        upstream=None if upstream == "any" else int(upstream),
        contains=tuple(fields.get("contains", ())),
        lacks=tuple(fields.get("lacks", ())),
        lacks_directly=tuple(fields.get("lacks-directly", ())),
        closes=fields.get("end", ["keep"])[0] == "close",
        data=_bytes(text),
    )


def _expected(text: str) -> Expected:
    return tuple(frozenset(statuses.split("|")) for statuses in text.split())


def _bytes(text: str) -> bytes:
    raw = text.replace("\n", "").encode("ascii")
    raw = _REPEAT.sub(lambda found: int(found[1]) * found[2], raw)
    return _ESCAPE.sub(lambda found: _unescaped(found[1]), raw)


def _unescaped(name: bytes) -> bytes:
    return _PLAIN[name] if name in _PLAIN else bytes([int(name[1:], 16)])
