"""``python -m tests.packaging`` checks that the distributions of this commit are complete and work.

It builds the sdist and, from that, the wheel; compares both with the files that git tracks; runs
the unit tests in the unpacked sdist; installs the wheel into a new environment and uses it in an
empty folder; and checks which commit each kind of build and installation reports. It prints each
step; a step that fails prints its output and ends the run with status 1.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

from tests.newcomer import NOT_INHERITED, StepFailed, clone_into, step
from tests.processes import clean_environ, default_signals_for_children

COMMIT_FILE = "gateway/commit.txt"
VARIABLE = "LMSTUDIO_GATEWAY_COMMIT"
PATIENCE = 600.0
#: Requests whose responses depend on data files and on modules that are imported late.
_REQUESTS = """
from gateway.app import create_app
from gateway.settings import load
client = create_app(load({"STATE_URL": "sqlite:///state.db"})).test_client()
for path in ("/debug/", "/openapi.json"):
    answer = client.get(path)
    assert answer.status_code == 200, (path, answer.status_code)
"""


def run(*command: str | Path, cwd: Path, **environ: str) -> str:
    """The output of a command, which must succeed. It does not get the caller's settings."""
    hidden = {*NOT_INHERITED, VARIABLE}
    clean = {name: text for name, text in clean_environ().items() if name not in hidden}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**clean, **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    if done.returncode:
        shown = " ".join(map(str, command))
        raise StepFailed(f"{done.stdout}\n({shown} ended with {done.returncode})")
    return done.stdout


def expect(condition: bool, fault: str) -> None:
    if not condition:
        raise StepFailed(fault)


def commit_in(wheel: Path) -> str:
    """The commit that a wheel carries."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(COMMIT_FILE).decode().strip()


def wheel_of(tree: Path, folder: Path, **environ: str) -> Path:
    """The wheel that ``pip install`` builds from a folder."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder]
    run(*command, tree, cwd=tree, **environ)
    [wheel] = folder.glob("*.whl")
    return wheel


def check_distributions(folder: Path) -> None:
    clone = clone_into(folder)
    tracked = set(run("git", "ls-files", cwd=clone).splitlines())
    commit = run("git", "rev-parse", "HEAD", cwd=clone)[:12]

    step("an sdist, and a wheel from it")
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", clone, cwd=folder)
    [sdist], [wheel] = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    compare(tracked, unpacked, wheel)
    for found in ((unpacked / COMMIT_FILE).read_text().strip(), commit_in(wheel)):
        expect(found == commit, f"built from {commit}, reported is {found}")

    step("the unit tests in the sdist")
    run(sys.executable, "-m", "pytest", "-q", "tests/unit", cwd=unpacked)

    step("the wheel in an empty folder")
    try_out(wheel, commit, folder)

    step("an editable installation, a modified checkout, and a tree without .git")
    try_editable(clone, commit, folder)
    (clone / "README.rst").write_text("modified\n")
    found = commit_in(wheel_of(clone, folder / "modified"))
    expect(found == f"{commit}+dirty", f"built from a modified {commit}, reported is {found}")
    shutil.rmtree(clone / ".git")
    found = commit_in(wheel_of(clone, folder / "variable", **{VARIABLE: commit + "0" * 28}))
    expect(found == commit, f"{VARIABLE} is {commit}, reported is {found}")


def compare(tracked: set[str], unpacked: Path, wheel: Path) -> None:
    """The sdist contains every tracked file, the wheel exactly those of the package."""
    missing = sorted(name for name in tracked if not (unpacked / name).is_file())
    expect(not missing, f"MANIFEST.in leaves out {missing}")
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {name for name in tracked if name.startswith("gateway/")} | {COMMIT_FILE}
    lacking, foreign = sorted(wanted - installed), sorted(installed - wanted)
    expect(installed == wanted, f"missing in the wheel: {lacking}; not tracked by git: {foreign}")


def try_out(wheel: Path, commit: str, folder: Path) -> None:
    """Install the wheel into a new environment and use it in an empty folder."""
    venv.create(folder / "venv", with_pip=True)
    programs, empty = folder / "venv" / "bin", folder / "empty"
    empty.mkdir()
    run(programs / "pip", "install", "--quiet", wheel, cwd=empty)
    for command in ([programs / "lmstudio-gateway"], [programs / "python", "-m", "gateway"]):
        shown = run(*command, "--version", cwd=empty)
        expect(f"(commit {commit})" in shown, f"built from {commit}, reported is {shown}")
    shown = run(programs / "lmstudio-gateway", "demo", "--once", cwd=empty)
    expect("loaded as primary" in shown, shown)
    run(programs / "python", "-c", _REQUESTS, cwd=empty)


def try_editable(clone: Path, commit: str, folder: Path) -> None:
    """An editable installation reads the commit from the checkout and writes nothing there."""
    programs = folder / "venv" / "bin"
    run(programs / "pip", "install", "--quiet", "--no-deps", "--editable", clone, cwd=folder)
    shown = run(programs / "lmstudio-gateway", "--version", cwd=folder)
    expect(f"(commit {commit})" in shown, f"{commit} is checked out, reported is {shown}")
    expect(not (clone / COMMIT_FILE).exists(), f"the installation wrote {COMMIT_FILE}")


def main() -> int:
    default_signals_for_children()
    with tempfile.TemporaryDirectory(prefix="packaging-") as folder:
        try:
            check_distributions(Path(folder))
        except (StepFailed, subprocess.TimeoutExpired) as failure:
            print(f"FAILED: {failure}", file=sys.stderr)
            return 1
    step("sdist and wheel are complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
