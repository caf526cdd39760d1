"""The commit is found in every kind of installation, and its absence is never an error."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from gateway import version
from gateway.app import create_app
from gateway.commands import main
from gateway.observe import Metrics
from gateway.settings import load

RECORDED = "0123456789ab"


def git(root: Path, *arguments: str) -> str:
    """The output of git in ``root``, independent of the user's own git configuration."""
    environ = {name: text for name, text in os.environ.items() if not name.startswith("GIT_")}
    environ |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    person = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]
    done = subprocess.run(
        ["git", *person, *arguments],
        cwd=root,
        env=environ,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder ``gateway`` that is in no repository."""
    folder = tmp_path / "checkout" / "gateway"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    return folder


@pytest.fixture
def head(package: Path) -> str:
    """Make a repository with one commit around ``package``; returns the commit's twelve digits."""
    root = package.parent
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "One")
    return git(root, "rev-parse", "HEAD")[:12]


def test_a_checkout_has_the_commit_of_its_head(package: Path, head: str) -> None:
    assert version.find_commit(package) == head


def test_a_tag_changes_nothing(package: Path, head: str) -> None:
    git(package.parent, "tag", "v9")
    assert version.find_commit(package) == head


def test_a_branch_may_be_packed(package: Path, head: str) -> None:
    git(package.parent, "branch", "other/name")
    git(package.parent, "pack-refs", "--all")
    assert not list((package.parent / ".git" / "refs" / "heads").iterdir())
    assert version.find_commit(package) == head
    git(package.parent, "commit", "--quiet", "--allow-empty", "--message", "Two")
    # the packed reference is stale now
    assert version.find_commit(package) == git(package.parent, "rev-parse", "HEAD")[:12] != head


def test_a_head_may_be_detached(package: Path, head: str) -> None:
    git(package.parent, "checkout", "--quiet", "--detach")
    assert version.find_commit(package) == head


def test_a_worktree_has_a_commit_of_its_own(package: Path, head: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    git(package.parent, "worktree", "add", "--quiet", str(other))
    git(other, "commit", "--quiet", "--allow-empty", "--message", "Two")
    assert version.find_commit(other / "gateway") == git(other, "rev-parse", "HEAD")[:12] != head
    git(package.parent, "pack-refs", "--all")
    assert version.find_commit(other / "gateway") == git(other, "rev-parse", "HEAD")[:12]
    assert version.find_commit(package) == head


@pytest.mark.usefixtures("head")
def test_a_repository_around_an_installed_package_is_ignored(package: Path) -> None:
    installed = package.parent / "venv" / "site-packages" / "gateway"
    installed.mkdir(parents=True)
    assert version.find_commit(installed) is None


def test_it_runs_no_git(package: Path, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert version.find_commit(package) == head


def test_without_a_repository_it_is_unknown(package: Path) -> None:
    assert version.find_commit(package) is None


def test_in_a_repository_without_commits_it_is_unknown(package: Path) -> None:
    git(package.parent, "init", "--quiet")
    assert version.find_commit(package) is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("HEAD", b""),
        ("HEAD", b"\xff"),
        ("HEAD", b"ref: refs/heads/.invalid\n"),  # as in a repository with reftables
        ("HEAD", b"ref: ../../gateway\n"),
        ("commondir", b"../nowhere\n"),
    ],
)
@pytest.mark.usefixtures("head")
def test_in_a_malformed_repository_it_is_unknown(package: Path, file: str, content: bytes) -> None:
    (package.parent / ".git" / file).write_bytes(content)
    assert version.find_commit(package) is None


def test_in_a_worktree_of_a_missing_repository_it_is_unknown(package: Path) -> None:
    (package.parent / ".git").write_text("gitdir: /nowhere/.git/worktrees/checkout\n")
    assert version.find_commit(package) is None


@pytest.mark.usefixtures("head")
def test_a_recorded_commit_wins_over_the_checkout(package: Path) -> None:
    version.record_commit(package, RECORDED)
    assert version.find_commit(package) == RECORDED


@pytest.mark.parametrize("content", [b"", b"main\n", b"\xff\xfe", b"0123\n", b"0123456789AB\n"])
def test_a_record_that_is_not_a_commit_is_ignored(package: Path, content: bytes) -> None:
    (package / "commit.txt").write_bytes(content)
    assert version.find_commit(package) is None


@pytest.mark.parametrize("value", ["ba9876543210", None])
def test_a_new_record_does_not_change_the_file_that_the_old_one_is_linked_to(
    package: Path, tmp_path: Path, value: str | None
) -> None:
    version.record_commit(package, RECORDED)
    built = tmp_path / "gateway"
    built.mkdir()
    # as sdist does with all files
    os.link(package / "commit.txt", built / "commit.txt")
    version.record_commit(built, value)
    assert version.find_commit(built) == value
    assert version.find_commit(package) == RECORDED


@pytest.mark.parametrize(("text", "commit"), [
    (RECORDED, RECORDED), (f"{RECORDED}+dirty\n", f"{RECORDED}+dirty"),
    (RECORDED + "f" * 28, RECORDED), (RECORDED + "f" * 28 + "+dirty", f"{RECORDED}+dirty"),
    ("", None), ("HEAD", None), (RECORDED[:11], None), (RECORDED + "f" * 53, None),
    (f"{RECORDED}-dirty", None), (f"{RECORDED} {RECORDED}", None),
])  # fmt: skip
def test_a_commit_is_cut_to_twelve_digits(text: str, commit: str | None) -> None:
    assert version.parse_commit(text) == commit


def test_create_app_determines_the_commit(tmp_path: Path) -> None:
    version.commit.cache_clear()
    create_app(load({"STATE_URL": f"sqlite:///{tmp_path}/state.db"}))
    assert version.commit.cache_info().currsize == 1


@pytest.mark.parametrize("found", [RECORDED, None])
def test_the_command_and_the_metric_report_version_and_commit(
    found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version, "commit", lambda: found)
    shown = found or "unknown"
    told = CliRunner().invoke(main, ["--version"])
    assert told.output == f"lmstudio-gateway, version {version.__version__} (commit {shown})\n"
    assert told.exit_code == 0
    [sample] = [
        sample
        for family in text_string_to_metric_families(Metrics().exposition(lambda: True).decode())
        for sample in family.samples
        if sample.name == "lmstudio_gateway_build_info"
    ]
    assert sample.labels == {"version": version.__version__, "commit": shown}
    assert sample.value == 1
