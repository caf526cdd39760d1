"""A running gateway reports the same version and commit everywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import Gateway


def run(*command: str, cwd: Path) -> str:
    """The output of a command."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


@pytest.mark.both_servers
def test_health_the_metric_and_the_command_agree(gateway: Gateway) -> None:
    health: dict[str, Any] = gateway.get("/health").json()
    shown = f"{health['version']} (commit {health['commit'] or 'unknown'})"
    command = [sys.executable, "-m", "gateway", "--version"]
    # in the folder in which the gateway was started, so that both import the same code
    assert run(*command, cwd=gateway.folder) == f"lmstudio-gateway, version {shown}\n"
    labels = [
        sample.labels
        for family in text_string_to_metric_families(gateway.get("/metrics").text)
        for sample in family.samples
        if sample.name == "lmstudio_gateway_build_info"
    ]
    assert labels == [
        {"version": health["version"], "commit": health["commit"] or "unknown"},
    ]


def test_python_m_gateway_is_the_command(tmp_path: Path) -> None:
    script = str(Path(sys.executable).with_name("lmstudio-gateway"))
    module = [sys.executable, "-m", "gateway"]
    for arguments in (["--help"], ["serve", "--help"], ["--version"]):
        shown = run(script, *arguments, cwd=tmp_path)
        # the usage line shows what was typed
        renamed = shown.replace("Usage: lmstudio-gateway ", "Usage: python -m gateway ")
        assert run(*module, *arguments, cwd=tmp_path) == renamed
