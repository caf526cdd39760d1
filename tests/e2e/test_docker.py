"""deploy/Dockerfile and deploy/compose.yaml, as far as they can be checked without Docker.

Their paths, commands and settings exist, and the health check detects a missing gateway. Nothing
here builds or runs a container.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.commands import main
from gateway.serving.launch import GRACEFUL_TIMEOUT
from gateway.settings import TABLE, load
from tests.processes import Gateway, Simulator, free_port

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SETTINGS = {setting.variable for setting in TABLE}
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICE = COMPOSE["services"]["gateway"]
STATE = "/var/lib/lmstudio-gateway"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, in order."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines) if name]


def arguments_of(instruction: str) -> list[str]:
    return [rest for name, rest in instructions() if name == instruction]


def copied() -> list[str]:
    """The files and folders that are copied from the checkout."""
    found = []
    for rest in arguments_of("COPY"):
        *sources, _ = shlex.split(rest)
        found += [] if sources[0].startswith("--from=") else sources
    return found


def environment() -> dict[str, str]:
    return dict(part.split("=", 1) for rest in arguments_of("ENV") for part in shlex.split(rest))


def test_every_instruction_exists() -> None:
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK"}
    assert {name for name, _ in instructions()} <= known | {"ARG", "CMD"}


def test_copied_files_exist_and_are_not_ignored() -> None:
    kept = re.findall(r"^!(.*)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert sorted(copied()) == sorted(kept)
    assert all((ROOT / name).exists() for name in kept)


def test_everything_that_the_installation_needs_is_copied() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    described = setup["metadata"]["long_description"].removeprefix("file: ")
    needed = {described, setup["metadata"]["license_files"], "setup.cfg", "setup.py"}
    packages = setup["options.packages.find"]["include"].split()
    needed |= {name for name in packages if "." not in name}
    assert set(copied()) == needed | {"requirements.txt"}


def test_it_runs_an_existing_command_and_not_as_root() -> None:
    (command,) = arguments_of("CMD")
    script, subcommand = json.loads(command)
    (entry,) = entry_points(group="console_scripts", name=script)
    assert entry.load() is main
    assert subcommand in main.commands
    assert arguments_of("USER") == ["lmstudio-gateway"]
    assert (
        "useradd --system --uid 10001 --no-create-home lmstudio-gateway " in arguments_of("RUN")[-1]
    )
    # the second stage has on its PATH what the first one installs
    (from_build,) = [
        rest.split() for rest in arguments_of("COPY") if rest.startswith("--from=build ")
    ]
    _, source, target = from_build
    assert source == target
    assert f"python -m venv --without-pip {source} " in arguments_of("RUN")[0]
    assert environment()["PATH"].startswith(f"{target}/bin:")
    # no build tools are left
    assert not re.search(r"apt-get|gcc|build-essential", " ".join(arguments_of("RUN")))


def test_the_build_receives_the_commit() -> None:
    (variable,) = re.findall(r'^VARIABLE = "(\w+)"', (ROOT / "setup.py").read_text(), re.MULTILINE)
    names = [name for name, _ in instructions()]
    assert arguments_of("ARG") == [f"{variable}="]
    # in the first stage, before the installation
    assert names.index("ARG") < names.index("RUN")
    assert SERVICE["build"]["args"] == {variable: f"${{{variable}:-}}"}


def test_the_settings_exist_and_are_valid() -> None:
    own = {name: text for name, text in environment().items() if name != "PATH"}
    assert set(own) <= SETTINGS
    settings = load({**own, "GATEWAY_API_KEY": "a-key-0123456789"})
    assert arguments_of("EXPOSE") == [str(settings.gateway_port)]
    assert arguments_of("VOLUME") == [STATE]
    assert settings.state_url == f"sqlite:///{STATE}/state.db"


@pytest.mark.parametrize(("more", "healthy"), [
    ({}, True), ({"REQUIRE_AUTH_FOR_HEALTH": "true", "GATEWAY_API_KEY": "k" * 20}, True),
    ({"IP_ALLOWLIST": "10.0.0.0/8"}, True), (None, False),
])  # fmt: skip
def test_the_health_check_detects_a_missing_gateway(
    simulator: Simulator, tmp_path: Path, more: dict[str, str] | None, healthy: bool
) -> None:
    (check,) = arguments_of("HEALTHCHECK")
    python, *arguments = json.loads(check.partition(" CMD ")[2])
    assert python == "python"
    gateway = None
    if more is not None:
        gateway = Gateway(tmp_path, simulator.url, WEB_CONCURRENCY=1, **more)
    environ = {**os.environ, "GATEWAY_PORT": str(gateway.port if gateway else free_port())}
    try:
        done = subprocess.run(
            [sys.executable, *arguments], env=environ, capture_output=True, check=False, timeout=60
        )
    finally:
        if gateway:
            gateway.stop()
    assert (done.returncode == 0) is healthy, done.stderr


def test_compose_builds_the_dockerfile_and_keeps_the_state() -> None:
    build = SERVICE["build"]
    context = (DEPLOY / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]) == DEPLOY / "Dockerfile"
    volumes = dict(one.split(":") for one in SERVICE["volumes"])
    assert volumes == {"state": STATE}
    assert set(COMPOSE["volumes"]) == {"state", "redis"}
    assert SERVICE["read_only"] is True
    assert SERVICE["tmpfs"] == ["/tmp"]
    assert int(SERVICE["stop_grace_period"].removesuffix("s")) > GRACEFUL_TIMEOUT


def test_the_settings_of_compose_exist_and_are_valid() -> None:
    settings = SERVICE["environment"]
    assert set(settings) <= SETTINGS
    values = {name: re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", text) for name, text in settings.items()}
    assert values == {name: text for name, text in environment().items() if name != "PATH"}
    assert {
        re.findall(r"\$\{(\w+):-", text)[0] for text in settings.values() if "$" in text
    } <= SETTINGS
    assert "host.docker.internal:host-gateway" in SERVICE["extra_hosts"]
    assert SERVICE["ports"] == [f"{values['GATEWAY_PORT']}:{values['GATEWAY_PORT']}"]


def test_redis_starts_only_with_its_profile() -> None:
    redis = COMPOSE["services"]["redis"]
    assert redis["profiles"] == ["redis"]
    (url,) = re.findall(r"STATE_URL=(redis://\S+)", (DEPLOY / "compose.yaml").read_text())
    assert load({"STATE_URL": url}).state_url == url
    assert url.startswith("redis://redis:6379/")
