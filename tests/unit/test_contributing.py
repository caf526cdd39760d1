"""CONTRIBUTING.rst names files and packages that exist, and lists every package."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.rst").read_text()
QUOTED = set(re.findall(r"``([^`\s]+)``", TEXT))


def test_every_file_that_is_named_exists() -> None:
    named = {name for name in QUOTED if re.fullmatch(r"[\w./]+", name)}
    named = {name for name in named if "." in name.strip(".") or "/" in name}
    named -= {name for name in named if name.startswith("/")}
    missing = {name for name in named if not any((folder / name).exists() for folder in _folders())}
    assert named
    assert missing == set()


def test_every_package_is_listed() -> None:
    parts = {path.name for path in (ROOT / "gateway").iterdir() if (path / "__init__.py").exists()}
    assert parts <= QUOTED


def _folders() -> tuple[Path, Path]:
    """The folders that paths are relative to: the checkout and the package."""
    return ROOT, ROOT / "gateway"
