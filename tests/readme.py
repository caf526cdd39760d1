"""The code blocks of README.rst, for the tests that run them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
_DIRECTIVE = re.compile(r"^( *)\.\. code-block:: (\S+)$")


class Block(NamedTuple):
    """``line`` is the directive's line number, ``text`` the block without its indentation."""

    language: str
    line: int
    text: str

    def commands(self) -> list[str]:
        """The first line of each command: every line that is neither indented nor a comment."""
        lines = self.text.splitlines()
        return [line for line in lines if line and line[0] not in " #"]

    def __str__(self) -> str:
        return f"README.rst line {self.line}: {self.commands()[0]}"


def blocks(path: Path = ROOT / "README.rst") -> list[Block]:
    """All code blocks of a file, in order."""
    found = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        if directive := _DIRECTIVE.match(line):
            margin = len(directive[1])
            body = []
            for inner in lines[number:]:
                if inner.strip() and len(inner) - len(inner.lstrip()) <= margin:
                    break
                body.append(inner)
            text = textwrap.dedent("\n".join(body)).strip("\n") + "\n"
            found.append(Block(directive[2], number, text))
    return found


def replaced(text: str, table: Mapping[str, str]) -> str:
    """Return ``text`` with each key of the table replaced by its value, all in one pass."""
    pattern = "|".join(map(re.escape, sorted(table, key=len, reverse=True)))
    return re.sub(pattern, lambda found: table[found[0]], text)
