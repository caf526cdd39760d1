"""Records the commit in wheels and sdists. Everything else is in setup.cfg."""

from __future__ import annotations

import os
import runpy
import subprocess
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
#: The commit for a build without ``.git``, e.g. in a container. It may end in ``+dirty``.
VARIABLE = "LMSTUDIO_GATEWAY_COMMIT"

# run instead of imported, as an isolated build does not have this folder on its path
VERSION = runpy.run_path(str(ROOT / "gateway" / "version.py"))


def commit() -> str | None:
    """The commit to record, in the form of ``gateway.version.commit``; None if unknown."""
    if given := os.environ.get(VARIABLE):
        found = VERSION["parse_commit"](given)
        if found is None:
            raise SystemExit(f"{VARIABLE}: {given!r} is not a commit of at least 12 digits")
        return found
    found = VERSION["commit"]()
    if found and not found.endswith("+dirty") and modified():
        found += "+dirty"
    return found


def modified() -> bool:
    """Whether tracked files differ from ``HEAD``; False if there is no git to ask."""
    git = ROOT / ".git"
    # explicit, as inside a git hook GIT_DIR overrides the current directory
    command = ["git", "--no-optional-locks", f"--git-dir={git}", f"--work-tree={ROOT}"]
    try:
        done = subprocess.run([*command, "diff", "--quiet", "HEAD"], cwd=ROOT, capture_output=True)
    except OSError:
        return False
    return done.returncode == 1


def record(tree: str) -> None:
    """Write the commit into the package below ``tree``."""
    VERSION["record_commit"](Path(tree, "gateway"), commit())


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        # an editable installation uses the checkout itself, whose commit changes
        if not self.editable_mode:
            record(self.build_lib)


class Sdist(sdist):
    def make_release_tree(self, base_dir: str, files: Any) -> None:
        super().make_release_tree(base_dir, files)
        record(base_dir)


setup(cmdclass={"build_py": BuildPy, "sdist": Sdist})
