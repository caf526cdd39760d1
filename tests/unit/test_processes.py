"""Tests of the functions that other tests use to start processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Ignores the signals that a background job under nohup ignores, sends them to itself, and prints
#: how children end that send them to themselves.
_SCRIPT = """
import os, signal, subprocess, sys
from tests.processes import default_signals_for_children
ignored = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
for number in ignored:
    signal.signal(number, signal.SIG_IGN)
default_signals_for_children()
for number in ignored:
    os.kill(os.getpid(), number)
for number in ignored:
    child = f"import os; os.kill(os.getpid(), {number})"
    print(subprocess.run([sys.executable, "-c", child], stderr=subprocess.DEVNULL).returncode)
"""


def test_children_of_a_process_that_ignores_signals_get_default_actions() -> None:
    command = [sys.executable, "-c", _SCRIPT]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    # after the KeyboardInterrupt, Python ends itself with SIGINT: hence -2
    assert (ran.stdout.split(), ran.returncode) == (["-2", "-1", "-15"], 0), ran.stderr
