"""The commands that manage a running gateway's models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from gateway.commands.options import activation_body, inference_options, load_body, remote_command

if TYPE_CHECKING:
    from gateway.commands.client import Event, Remote


@click.command()
@remote_command
def models(gateway: Remote, as_json: bool) -> None:
    """List the active, the loaded and the downloaded models."""
    from gateway.commands import terminal

    raw = gateway.get("/admin/models")
    if as_json:
        terminal.echo_json(raw)
    else:
        terminal.show(terminal.listing(json.loads(raw)))


@click.command()
@remote_command
@click.argument("model", metavar="KEY")
@click.option("--as", "instance", metavar="ID", help="Identifier of the instance.")
@click.option("--context-length", type=int, metavar="TOKENS")
@click.option("--gpu", metavar="max|off|RATIO", help="How much of the model goes to the GPU.")
@click.option("--cpu-threads", type=int)
@click.option("--ttl", type=int, metavar="SECONDS", help="Unload it after this time without use.")
@click.option(
    "--set",
    "fields",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Any other field of loadConfig, e.g. flashAttention=true or gpu.mainGpu=0. Repeatable.",
)
@inference_options
@click.option("--no-activate", is_flag=True, help="Do not change the active model.")
def load(gateway: Remote, as_json: bool, model: str, **options: Any) -> None:
    """Load a model and make it the active one. Ctrl-C cancels the load."""
    from gateway.commands import terminal

    body = load_body(model, **options)
    no_progress = nullcontext(lambda percent: None)
    try:
        with (
            gateway.stream("POST", "/admin/models/load", json=body) as events,
            no_progress if as_json else terminal.progress(f"Loading {model}") as show,
        ):
            raw = _loaded(events, show)
    except KeyboardInterrupt:
        terminal.echo_error(f"Interrupted: the gateway cancels the load of {model}.")
        raise
    if as_json:
        terminal.echo_json(raw)
        return
    result = json.loads(raw)
    active = "active" if result["activated"] else "not activated"
    took = result["totalTimeMs"]
    terminal.echo(f"Loaded {model} as {result['instanceId']} in {took} ms, {active}.")
    terminal.echo(f"Applied: {terminal.members(result['appliedConfig']) or '-'}")
    for warning in result["warnings"]:
        terminal.echo_error(f"Warning: {warning}")


@click.command()
@remote_command
@click.argument("name", metavar="KEY|ID")
def unload(gateway: Remote, as_json: bool, name: str) -> None:
    """Unload a model by its key or by its instance's ID."""
    from gateway.commands.client import ErrorResponse

    try:
        raw = gateway.post("/admin/models/unload", {"instanceId": name})
    except ErrorResponse as error:
        if error.status != 404:
            raise
        raw = gateway.post("/admin/models/unload", {"modelKey": name})
    _print_result(raw, as_json, "Unloaded {modelKey}, instance {instanceId}, in {totalTimeMs} ms.")


@click.command()
@remote_command
@click.argument("model", metavar="KEY")
@click.option("--instance", metavar="ID", help="The loaded instance to use.")
@inference_options
def activate(gateway: Remote, as_json: bool, model: str, **options: Any) -> None:
    """Choose the model for requests that name no model."""
    raw = gateway.post("/admin/models/activate", activation_body(model, **options))
    _print_result(raw, as_json, "Activated: {message}.")


@click.command()
@remote_command
def deactivate(gateway: Remote, as_json: bool) -> None:
    """Make no model the active one."""
    _print_result(gateway.post("/admin/models/deactivate", {}), as_json, "No model is active.")


def _loaded(events: Iterator[Event], show: Callable[[float], None]) -> str:
    """Follow a load to its end and return the data of ``model_load_complete``."""
    from gateway.commands.client import Unreachable, error_response

    for event in events:
        if event.name == "model_load_complete":
            return event.data
        data = json.loads(event.data)
        if event.name == "error":
            raise error_response(data["status"], data)
        if event.name == "model_load_progress":
            show(data["progress"])
    raise Unreachable("The gateway closed the connection before the load was complete.")


def _print_result(raw: bytes, as_json: bool, text: str) -> None:
    """Print the gateway's JSON as it is, or the text filled in with its fields."""
    from gateway.commands import terminal

    if as_json:
        terminal.echo_json(raw)
    else:
        terminal.echo(text.format_map(json.loads(raw)))


COMMANDS = (models, load, unload, activate, deactivate)
