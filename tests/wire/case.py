"""A case of the corpus: what a client sends, byte by byte, and what must come of it.

A file of ``cases/`` begins with a header block, a line ``name: value`` each::

    why: one sentence
    gateway: keyed (default), open, adminonly, walled or proxied: see test_corpus.py
    status: the answers in their order: ``400``, ``200 401``; alternatives are ``400|closed``.
            ``closed`` is a connection that ends without an answer, ``waits`` one where none comes,
            ``headless`` an answer as in HTTP/0.9, which is nothing but a body
    behind-nginx: ``same`` (default) or a status line like the one above
    upstream: how many requests may reach LM Studio: a number or ``any``
    contains: a text that the last answer must contain (several lines: all of them)
    lacks: a text that no answer and nothing sent to LM Studio may contain
    lacks-directly: the same, but nginx passes it on
    end: ``keep`` (default) or ``close``: what the client does after its last byte

After a line ``---`` come the bytes. Line breaks of the file mean nothing; ``\\r``, ``\\n``,
``\\t``, ``\\\\`` and ``\\xHH`` are bytes; ``{{9000*a}}`` is 9000 times ``a``, in which ``}`` is
``\\x7d``.
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

#: One place in the order of answers: the statuses that are right there.
Expected = tuple[frozenset[str], ...]


@dataclass(frozen=True)
class Case:
    """One file."""

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
    """All cases, by name."""
    return [_read(path) for path in sorted(FOLDER.glob("*.txt"))]


def _read(path: Path) -> Case:
    head, mark, written = path.read_text().partition("\n---\n")
    assert mark, f"{path}: no line with ---"
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
        data=_bytes(written),
    )


def _expected(written: str) -> Expected:
    return tuple(frozenset(place.split("|")) for place in written.split())


def _bytes(written: str) -> bytes:
    raw = written.replace("\n", "").encode("ascii")
    raw = _REPEAT.sub(lambda found: int(found[1]) * found[2], raw)
    return _ESCAPE.sub(lambda found: _unescaped(found[1]), raw)


def _unescaped(name: bytes) -> bytes:
    return _PLAIN[name] if name in _PLAIN else bytes([int(name[1:], 16)])
