"""The commands that manage models over HTTP, on any running gateway."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gateway.commands.client import Event, Remote
from gateway.commands.options import activation_body, inference_options, load_body, remote_command


@click.command()
@remote_command
def models(gateway: Remote, as_json: bool) -> None:
    """List what is active, loaded and downloaded."""
    from gateway.commands import terminal

    raw = gateway.get("/admin/models")
    if as_json:
        click.echo(raw)
    else:
        terminal.show(terminal.listing(json.loads(raw)))


@click.command()
@remote_command
@click.argument("model", metavar="KEY")
@click.option("--as", "instance", metavar="ID", help="Name of the instance.")
@click.option("--context-length", type=int, metavar="TOKENS")
@click.option("--gpu", metavar="max|off|RATIO", help="How much of the model the GPU takes.")
@click.option("--cpu-threads", type=int)
@click.option("--ttl", type=int, metavar="SECONDS", help="Unload after that time without use.")
@click.option(
    "--set",
    "fields",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Any other field of loadConfig, e.g. flashAttention=true or gpu.mainGpu=0. Repeatable.",
)
@inference_options
@click.option("--no-activate", is_flag=True, help="Leave the active model as it is.")
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
        terminal.tell(f"Interrupted: the gateway cancels the load of {model}.")
        raise
    if as_json:
        click.echo(raw)
        return
    answer = json.loads(raw)
    active = "active" if answer["activated"] else "not activated"
    took = answer["totalTimeMs"]
    terminal.say(f"Loaded {model} as {answer['instanceId']} in {took} ms, {active}.")
    terminal.say(f"Applied: {terminal.members(answer['appliedConfig']) or '-'}")
    for warning in answer["warnings"]:
        terminal.tell(f"Warning: {warning}")


@click.command()
@remote_command
@click.argument("name", metavar="KEY|ID")
def unload(gateway: Remote, as_json: bool, name: str) -> None:
    """Unload a model by its key or by its instance's ID."""
    from gateway.commands.client import Refused

    try:
        raw = gateway.post("/admin/models/unload", {"instanceId": name})
    except Refused as error:
        if error.status != 404:
            raise
        raw = gateway.post("/admin/models/unload", {"modelKey": name})
    _answer(raw, as_json, "Unloaded {modelKey}, instance {instanceId}, in {totalTimeMs} ms.")


@click.command()
@remote_command
@click.argument("model", metavar="KEY")
@click.option("--instance", metavar="ID", help="Which of its loaded instances.")
@inference_options
def activate(gateway: Remote, as_json: bool, model: str, **options: Any) -> None:
    """Choose the model for requests that name none."""
    raw = gateway.post("/admin/models/activate", activation_body(model, **options))
    _answer(raw, as_json, "Activated: {message}.")


@click.command()
@remote_command
def deactivate(gateway: Remote, as_json: bool) -> None:
    """Let no model be the active one."""
    _answer(gateway.post("/admin/models/deactivate", {}), as_json, "No model is active.")


def _loaded(events: Iterator[Event], show: Callable[[float], None]) -> str:
    """Follow a load to its end; returns the data of ``model_load_complete``."""
    from gateway.commands.client import NotReachable, refusal

    for event in events:
        if event.name == "model_load_complete":
            return event.data
        told = json.loads(event.data)
        if event.name == "error":
            raise refusal(told["status"], told)
        if event.name == "model_load_progress":
            show(told["progress"])
    raise NotReachable("The gateway went away before the load had ended.")


def _answer(raw: bytes, as_json: bool, words: str) -> None:
    """An answer as it came, or in words."""
    from gateway.commands import terminal

    if as_json:
        click.echo(raw)
    else:
        terminal.say(words.format_map(json.loads(raw)))


COMMANDS = (models, load, unload, activate, deactivate)
