"""Imports point down the layers, use packages' public names, and are at the top of a module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

GATEWAY = Path(__file__).parents[2] / "gateway"
#: The packages and modules from top to bottom: each may import what is below it.
LAYERS = (
    "__main__",
    "commands",
    "serving",
    "app",
    "front",
    "openapi",
    "proxy",
    "admin",
    "debug",
    "observe",
    "request",
    "lmstudio",
    "state",
    "settings",
    "sse",
    "logs",
    "clock",
    "errors",
    "version",
)
#: Packages that cost much to import or may be missing: functions may import them late.
HEAVY = {
    *("gunicorn", "prometheus_client", "redis", "requests", "resource", "rich"),
    # the application and what only some commands need, with all that they import
    *("gateway.app", "gateway.commands", "gateway.openapi", "gateway.serving", "gateway.simulator"),
    *("gateway.state.redis", "gevent"),
}


class Import(NamedTuple):
    """One module that is imported at a line of a file; ``late`` inside a function."""

    file: str
    line: int
    module: str
    late: bool

    def __str__(self) -> str:
        return f"gateway/{self.file}:{self.line} imports {self.module}"


@cache
def imports() -> tuple[Import, ...]:
    """Every import of the package, including those that only a type checker sees."""
    return tuple(found for path in sorted(GATEWAY.rglob("*.py")) for found in _imports_of(path))


def _imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text())
    file = str(path.relative_to(GATEWAY))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    late = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, id(node) in late)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"gateway/{file}:{node.lineno}: a relative import"
            for name in _modules(node):
                yield Import(file, node.lineno, name, id(node) in late)


def _modules(node: ast.ImportFrom) -> set[str]:
    """The modules that a ``from … import …`` loads."""
    assert node.module is not None
    folder = GATEWAY.parent / node.module.replace(".", "/")
    submodules = {
        f"{node.module}.{alias.name}"
        for alias in node.names
        if (folder / f"{alias.name}.py").exists() or (folder / alias.name).is_dir()
    }
    return submodules or {node.module}


def part(module: str) -> str:
    """``gateway.proxy.relay`` → ``proxy``."""
    return module.split(".")[1] if "." in module else ""


def own(found: Import) -> str:
    """The package or module that a file belongs to."""
    return found.file.partition("/")[0].removesuffix(".py")


def test_every_package_and_module_has_its_layer() -> None:
    parts = {
        path.name.removesuffix(".py")
        for path in GATEWAY.iterdir()
        if path.is_dir() or path.suffix == ".py"
    }
    assert parts - {"__init__", "__pycache__"} == {*LAYERS, "simulator"}


def test_imports_point_down_the_layers() -> None:
    upward = [
        str(found)
        for found in imports()
        if found.module.startswith("gateway.")
        and own(found) in LAYERS
        and part(found.module) in LAYERS
        and LAYERS.index(part(found.module)) < LAYERS.index(own(found))
    ]
    assert upward == []


def test_only_the_commands_import_the_simulator_which_imports_nothing_of_the_gateway() -> None:
    wrong = [
        str(found)
        for found in imports()
        if (part(found.module) == "simulator" and own(found) not in ("simulator", "commands"))
        or (
            own(found) == "simulator"
            and found.module.startswith("gateway")
            and part(found.module) != "simulator"
            and found.file != "simulator/__main__.py"  # which is the command of that name
        )
    ]
    assert wrong == []


def test_no_modules_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for found in imports():
        module = "gateway." + found.file.removesuffix(".py").replace("/", ".")
        if found.module.startswith("gateway."):
            graph.setdefault(module.removesuffix(".__init__"), set()).add(found.module)
    for module, needed in graph.items():
        # a package's __init__ imports its modules, which import each other directly
        needed -= {other for other in needed if module.startswith(f"{other}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as cycle:
        pytest.fail(" → ".join(cycle.args[1]))


def test_other_packages_are_imported_by_their_public_names() -> None:
    behind = [
        str(found)
        for found in imports()
        if found.module.startswith("gateway.")
        and part(found.module) != own(found)
        and found.module.count(".") > 1
        and not _is_public(found.module)
        # the __init__ would import it before gevent has patched the process
        and found.module != "gateway.simulator.server"
    ]
    assert behind == []


def _is_public(module: str) -> bool:
    """Whether a package names this module of its own in ``__all__``."""
    package, _, name = module.rpartition(".")
    init = (GATEWAY.parent / package.replace(".", "/") / "__init__.py").read_text()
    return f'"{name}"' in init.partition("__all__")[2]


@pytest.mark.parametrize(
    "package", [one for one in (*LAYERS, "simulator") if (GATEWAY / one).is_dir()]
)
def test_every_package_says_what_it_is_for(package: str) -> None:
    tree = ast.parse((GATEWAY / package / "__init__.py").read_text())
    lines = (ast.get_docstring(tree) or "").splitlines()
    assert 5 <= len(lines) <= 11
    text = " ".join(lines)
    assert "the file to read first" in text
    assert "must not know" in text or "imports nothing" in text
    assert any(
        isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__" for n in tree.body
    )


def test_imports_inside_functions_are_of_heavy_or_optional_packages() -> None:
    late = [
        str(found)
        for found in imports()
        if found.late and not any(f"{found.module}.".startswith(f"{name}.") for name in HEAVY)
    ]
    assert late == []


def test_no_module_is_long() -> None:
    long = {
        str(path.relative_to(GATEWAY)): length
        for path in GATEWAY.rglob("*.py")
        if (length := len(path.read_text().splitlines())) > 350
    }
    assert long == {}
