"""The OpenAPI document is valid, complete, and agrees with the validation of the code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from marshmallow import Schema
from openapi_spec_validator import validate
from werkzeug.routing import Rule

from gateway import errors
from gateway.admin import schemas
from gateway.app import create_app
from gateway.openapi.document import document
from gateway.proxy import injection
from gateway.settings import load

DOCUMENT = document()
PATHS = DOCUMENT["paths"]
COMPONENTS = DOCUMENT["components"]
#: Methods that Flask adds on its own.
IMPLIED = {"HEAD", "OPTIONS"}


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rule]:
    """The routes of the application by their paths in OpenAPI's notation."""
    state = tmp_path_factory.mktemp("state") / "state.db"
    app = create_app(load({"STATE_URL": f"sqlite:///{state}"}))
    return {rule.rule.replace("<path:rest>", "{path}"): rule for rule in app.url_map.iter_rules()}


def test_the_document_is_valid_openapi() -> None:
    validate(json.loads(json.dumps(DOCUMENT)))


def test_every_route_is_described_and_no_other(rules: dict[str, Rule]) -> None:
    # paths with a shorthand are described one by one, although /v1/{path} serves them
    shorthand = {*errors.SHORTHAND, "/models/{path}"}
    expected = set(rules) | {"/v1" + path for path in shorthand}
    undescribed, unknown = sorted(expected - set(PATHS)), sorted(set(PATHS) - expected)
    assert not undescribed, f"gateway/openapi/operations.py does not describe {undescribed}"
    assert not unknown, f"gateway/openapi/operations.py describes missing routes: {unknown}"


def test_every_method_is_described_and_no_other(rules: dict[str, Rule]) -> None:
    for path, rule in rules.items():
        described = {method.upper() for method in PATHS[path]}
        if rule.methods is None:
            assert described, path
        else:
            assert described == rule.methods - IMPLIED, path


def test_every_path_parameter_is_named() -> None:
    for path, operations in PATHS.items():
        for operation in operations.values():
            named = [p for p in operation.get("parameters", []) if p["in"] == "path"]
            assert bool(named) == ("{path}" in path), path


def test_every_injected_member_is_described() -> None:
    for path, endpoint in injection.ENDPOINTS.items():
        for known in (path, path.removeprefix("/v1")):
            body = PATHS[known]["post"]["requestBody"]["content"]["application/json"]["schema"]
            assert set(body["properties"]) >= {"model", *endpoint.members.values()}


def refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from ([node["$ref"]] if "$ref" in node else [])
        node = list(node.values())
    for inner in node if isinstance(node, list) else []:
        yield from refs(inner)


def test_every_component_is_used() -> None:
    kinds = ("schemas", "headers")
    defined = {f"#/components/{kind}/{name}" for kind in kinds for name in COMPONENTS[kind]}
    assert defined <= set(refs(DOCUMENT))


def test_the_document_is_built_on_first_use(tmp_path: Path) -> None:
    program = (
        "import sys; from gateway.app import create_app; from gateway.settings import load\n"
        f"client = create_app(load({{'STATE_URL': 'sqlite:///{tmp_path}/s.db'}})).test_client()\n"
        "assert 'apispec' not in sys.modules\n"
        "assert client.get('/openapi.json').json['openapi'] == '3.1.0'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_what_keyless_gateways_reject_is_described() -> None:
    for path, operations in PATHS.items():
        posts_to_admin = path.startswith("/admin/") and "post" in operations
        for operation in operations.values():
            assert "403" in operation["responses"], path
            assert ("415" in operation["responses"]) == posts_to_admin, path
    for code, status in (
        ("origin_not_allowed", 403),
        ("host_not_allowed", 403),
        ("unsupported_media_type", 415),
    ):
        assert f"`{code}`" in COMPONENTS["responses"][f"AdminError{status}"]["description"]


# The bodies of /admin

BODIES: dict[str, Schema] = {
    "Load": schemas.LoadSchema(),
    "Unload": schemas.UnloadSchema(),
    "Activate": schemas.ActivateSchema(),
    "Deactivate": schemas.DeactivateSchema(),
}
#: Tried for every field, valid or not. JSON Schema accepts 8.0 as an integer and the gateway does
#: not, so there are no such values here.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 0.5, -0.5, 1.5, 2, 2.5, 10.5, 10**30, "", "text", "x" * 512,
    "x" * 513, "max", "off", "evenly", "f16", "false", [], [0], [1, -1], [True], ["a"], [""],
    ["a"] * 64, ["a"] * 65, {}, {"unknown": 1},
]  # fmt: skip


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    return COMPONENTS["schemas"][name] if name else schema


def fields(schema: dict[str, Any]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """The path and schema of every field, nested ones included."""
    for name, inner in schema.get("properties", {}).items():
        found = resolved(inner)
        yield [name], found
        yield from (([name, *path], field) for path, field in fields(found))


def bodies(name: str) -> Iterator[Any]:
    """Bodies that try each field with values inside and outside its range."""
    yield from VALUES
    for path, field in fields(COMPONENTS["schemas"][name]):
        bounds = [field[bound] for bound in ("minimum", "maximum") if bound in field]
        for value in [*VALUES, *bounds, *(bound + step for bound in bounds for step in (-1, 1))]:
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            nested = value
            for part in reversed(path):
                nested = {part: nested}
            yield nested
            yield {"modelKey": "m", **nested}


@pytest.mark.parametrize("name", BODIES)
def test_the_document_accepts_exactly_what_the_gateway_accepts(name: str) -> None:
    described = Draft202012Validator({**COMPONENTS["schemas"][name], "components": COMPONENTS})
    outcomes = set()
    for body in bodies(name):
        accepted = not BODIES[name].validate(body)
        assert described.is_valid(body) == accepted, body
        outcomes.add(accepted)
    assert outcomes == {True, False}
