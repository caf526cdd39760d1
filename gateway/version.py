"""The version of the gateway, and the commit that it was built from.

Wheels and sdists carry the commit in ``gateway/commit.txt``, which ``setup.py`` writes. In a
checkout, whose code changes without a build, it is read from ``.git``. ``setup.py`` runs this file
before any dependency is installed: import nothing but the standard library here.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

__version__ = "0.1.0"

_COMMIT = re.compile(r"([0-9a-f]{12})[0-9a-f]{0,52}((?:\+dirty)?)")


@cache
def commit() -> str | None:
    """The commit of the running code, or None if it is unknown.

    Twelve hexadecimal digits, followed by ``+dirty`` if the build was made from modified files.
    Modified files of a checkout are not reported. :func:`gateway.app.create_app` makes the first
    call, because a checkout may have moved on to another commit by the time of the first request.
    """
    return find_commit(Path(__file__).parent)


def identity() -> str:
    """The version and the commit in one line, e.g. ``0.1.0 (commit fb8757936c69)``."""
    return f"{__version__} (commit {commit() or 'unknown'})"


def find_commit(package: Path) -> str | None:
    """The commit of the code in the folder ``package``: as recorded there, else as checked out."""
    return _recorded(package) or _checked_out(package.parent)


def parse_commit(text: str) -> str | None:
    """Shorten a commit of 12 to 64 digits as :func:`commit` returns it; None if it isn't one."""
    found = _COMMIT.fullmatch(text.strip())
    return found[1] + found[2] if found else None


def record_commit(package: Path, value: str | None) -> None:
    """Write ``commit.txt`` into the package's copy in a build or an sdist; None removes it."""
    file = package / "commit.txt"
    # an earlier build may have left one, and sdist makes hard links to the files of the source tree
    file.unlink(missing_ok=True)
    if value is not None:
        file.write_text(f"{value}\n")


def _recorded(package: Path) -> str | None:
    try:
        return parse_commit((package / "commit.txt").read_text())
    except (OSError, ValueError):
        return None


def _checked_out(root: Path) -> str | None:
    """The commit at ``HEAD``, read from the files that gitrepository-layout(5) describes.

    It doesn't run git: there may be none, and a worker under gevent should not start processes.
    """
    # only a repository right here is the gateway's; one further up may just contain a venv
    git = root / ".git"
    try:
        if git.is_file():  # in a worktree or a submodule
            git = root / git.read_text().removeprefix("gitdir:").strip()
        return _head(git)
    except (OSError, ValueError):
        return None


def _head(git: Path) -> str | None:
    head = (git / "HEAD").read_text().strip()
    branch = head.removeprefix("ref: ")
    if branch == head:
        return parse_commit(head)
    common = git / "commondir"
    if common.exists():  # a worktree has a HEAD of its own but shares the branches
        git = git / common.read_text().strip()
    if (git / branch).exists():
        return parse_commit((git / branch).read_text())
    packed = (line.split(" ", 1) for line in (git / "packed-refs").read_text().splitlines())
    return next((parse_commit(digits) for digits, *name in packed if name == [branch]), None)
