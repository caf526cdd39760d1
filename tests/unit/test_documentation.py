"""README.rst and .env.example document exactly what the code offers."""

from __future__ import annotations

import re
from pathlib import Path

from gateway.app import create_app
from gateway.commands import models, watching
from gateway.observe import TYPES, Metrics
from gateway.settings import TABLE, load

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.rst").read_text()
#: Variables that gunicorn and the administrators' commands read; they are not in the table.
OTHERS = {"WEB_CONCURRENCY", "GATEWAY_URL"}
COMMANDS = (*models.COMMANDS, *watching.COMMANDS)
VARIABLES = {setting.variable for setting in TABLE} | OTHERS


def test_readme_lists_every_setting_and_no_other() -> None:
    table = README.split("\nSettings\n")[1].split("\nEndpoints\n")[0]
    assert set(re.findall(r"^``([A-Z_]+)`` ", table, re.MULTILINE)) == VARIABLES


def test_readme_shows_the_default_of_every_setting() -> None:
    for setting in TABLE:
        row = re.search(rf"^``{setting.variable}`` +(\S+)", README, re.MULTILINE)
        assert row is not None
        default = setting.default or {"STATE_URL": "SQLite"}.get(setting.variable, "empty")
        assert row[1].strip("`") == default


def test_env_example_lists_every_setting_with_its_default() -> None:
    lines = re.findall(r"^([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    defaults = {setting.variable: setting.default for setting in TABLE}
    defaults |= dict.fromkeys(OTHERS, "")
    assert dict(lines) == defaults


def test_readme_lists_every_route_and_no_other(tmp_path: Path) -> None:
    table = README.split("\nEndpoints\n")[1].split("A key comes as")[0]
    documented = {
        re.sub(r"\*$", "<>", path) for path in re.findall(r"``(?:GET |POST )?(/[^`]*)``", table)
    }
    settings = load({"STATE_URL": f"sqlite:///{tmp_path}/state.db"})
    rules = {str(rule) for rule in create_app(settings).url_map.iter_rules()}
    assert documented == {re.sub(r"<[^>]*>$", "<>", rule) for rule in rules}


def test_readme_lists_every_command_and_no_other() -> None:
    table = README.split("\nCommand line\n")[1].split("\n.. code-block")[0]
    documented = re.findall(r"^``lmstudio-gateway ([a-z]+)\b.*?`` ", table, re.MULTILINE)
    assert documented == [command.name for command in COMMANDS]


def test_readme_lists_every_event_and_no_other() -> None:
    table = README.split("\nEvent  ")[1].split("``GET /debug/status``")[0]
    assert set(re.findall(r"^``([a-z_]+)`` ", table, re.MULTILINE)) == set(TYPES)


def test_readme_lists_every_metric_and_no_other() -> None:
    table = README.split("\nMetric  ")[1].split("The log goes")[0]
    documented = set(re.findall(r"^``([a-z_]+)`` ", table, re.MULTILINE))
    text = Metrics().exposition(lambda: True).decode()
    assert documented == set(re.findall(r"^# TYPE (\S+) (?!gauge\n.*_created)", text, re.MULTILINE))


def test_ci_runs_the_readme_test_command() -> None:
    command = "pip install '.[test]' && pytest"
    assert command in README
    assert command in (ROOT / ".ci/run").read_text().replace("-q ", "")
