"""The commands for administrators: what a running gateway does, asked over HTTP.

Each ends with an exit status that scripts can rely on: 0 done, 1 the gateway answered an error,
2 wrong usage, 3 the gateway can't be reached, 4 not allowed, 130 interrupted. requests and rich
(:mod:`gateway.remote`, :mod:`gateway.terminal`) are imported when a command runs, so that ``serve``
starts without them.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from gateway import __version__

if TYPE_CHECKING:
    from rich.console import Group

    from gateway.remote import Event, Remote

INTERRUPTED = 130


def _remote(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--url``, ``--key`` and ``--json``, the gateway as its first argument, errors
    in words on stderr, and the exit statuses."""

    @click.option("--url", help="The gateway's URL.  [GATEWAY_URL, else http://127.0.0.1:8002]")
    @click.option(
        "--key",
        help="An (admin) key. Others can see it in the list of processes, unlike GATEWAY_ADMIN_KEY"
        " or GATEWAY_API_KEY in the environment or in .env.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print the gateway's JSON as it is.")
    @functools.wraps(function)
    def run(url: str | None, key: str | None, **options: Any) -> None:
        for output in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the shell
            output.reconfigure(errors="backslashreplace")
        try:
            from gateway.remote import Remote, RemoteError
            from gateway.terminal import tell

            function(Remote(url, key), **options)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except RemoteError as error:
            tell(f"Error: {error}")
            sys.exit(error.exit_status)
        except (LookupError, TypeError, ValueError) as fault:
            version = f"Is it a gateway of a version near {__version__}?"
            tell(f"Error: An answer was not understood ({fault!r}). {version}")
            sys.exit(1)

    return run


def _default_inference(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that ``defaultInference`` comes from."""
    field = click.option(
        "--default",
        "defaults",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Any other field of defaultInference, e.g. topP=0.9. Repeatable.",
    )
    limit = click.option("--max-tokens", type=int, help="Default length of an answer, at most.")
    temperature = click.option("--temperature", type=float, help="Default temperature.")
    return temperature(limit(field(function)))


# Models ---------------------------------------------------------------------------------------


@click.command()
@_remote
def models(gateway: Remote, as_json: bool) -> None:
    """List what is active, loaded and downloaded."""
    from gateway import terminal

    raw = gateway.get("/admin/models")
    if as_json:
        click.echo(raw)
    else:
        terminal.show(terminal.listing(json.loads(raw)))


@click.command()
@_remote
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
@_default_inference
@click.option("--no-activate", is_flag=True, help="Leave the active model as it is.")
def load(gateway: Remote, as_json: bool, model: str, **options: Any) -> None:
    """Load a model and make it the active one. Ctrl-C cancels the load."""
    from gateway import terminal

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
@_remote
@click.argument("name", metavar="KEY|ID")
def unload(gateway: Remote, as_json: bool, name: str) -> None:
    """Unload a model by its key or by its instance's ID."""
    from gateway.remote import Refused

    try:
        raw = gateway.post("/admin/models/unload", {"instanceId": name})
    except Refused as error:
        if error.status != 404:
            raise
        raw = gateway.post("/admin/models/unload", {"modelKey": name})
    _answer(raw, as_json, "Unloaded {modelKey}, instance {instanceId}, in {totalTimeMs} ms.")


@click.command()
@_remote
@click.argument("model", metavar="KEY")
@click.option("--instance", metavar="ID", help="Which of its loaded instances.")
@_default_inference
def activate(gateway: Remote, as_json: bool, model: str, **options: Any) -> None:
    """Choose the model for requests that name none."""
    raw = gateway.post("/admin/models/activate", _body(model, **options))
    _answer(raw, as_json, "Activated: {message}.")


@click.command()
@_remote
def deactivate(gateway: Remote, as_json: bool) -> None:
    """Let no model be the active one."""
    _answer(gateway.post("/admin/models/deactivate", {}), as_json, "No model is active.")


def load_body(
    model: str,
    context_length: int | None = None,
    gpu: str | None = None,
    cpu_threads: int | None = None,
    ttl: int | None = None,
    fields: tuple[str, ...] = (),
    no_activate: bool = False,
    **others: Any,
) -> dict[str, Any]:
    """The body of ``POST /admin/models/load``; UsageError for a field given badly or twice."""
    config: dict[str, Any] = {}
    ratio = None if gpu is None else _value(gpu)
    options = {"contextLength": context_length, "cpuThreads": cpu_threads, "gpu.ratio": ratio}
    _put_all(config, options, fields, "--set")
    body = _body(model, **others)
    if config:
        body["loadConfig"] = config
    if ttl is not None:
        body["ttlSeconds"] = ttl
    if no_activate:
        body["activate"] = False
    return body


def _body(
    model: str,
    instance: str | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    defaults: tuple[str, ...] = (),
) -> dict[str, Any]:
    """What the bodies of loading and activating have in common."""
    inference: dict[str, Any] = {}
    options = {"temperature": temperature, "maxTokens": max_tokens}
    _put_all(inference, options, defaults, "--default")
    body: dict[str, Any] = {"modelKey": model}
    if instance is not None:
        body["instanceId"] = instance
    if inference:
        body["defaultInference"] = inference
    return body


def _put_all(
    target: dict[str, Any], options: dict[str, Any], assignments: tuple[str, ...], option: str
) -> None:
    """Set the options that were given, and each ``FIELD=VALUE`` behind ``option``."""
    for field, value in options.items():
        if value is not None:
            _put(target, field, value)
    for assignment in assignments:
        field, equals, text = assignment.partition("=")
        if not equals or not all(field.split(".")):
            raise click.UsageError(f"{option} {assignment}: must be FIELD=VALUE.")
        _put(target, field, _value(text))


def _put(target: dict[str, Any], field: str, value: Any) -> None:
    """Set ``a.b`` in nested objects."""
    *outer, last = field.split(".")
    for name in outer:
        target = target.setdefault(name, {})
        if not isinstance(target, dict):
            raise click.UsageError(f"{field}: {name} has a value of its own already.")
    if last in target:
        raise click.UsageError(f"{field}: is given twice.")
    target[last] = value


def _value(text: str) -> Any:
    """What a text means as JSON, else the text."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _loaded(events: Iterator[Event], show: Callable[[float], None]) -> str:
    """Follow a load to its end; returns the data of ``model_load_complete``."""
    from gateway.remote import NotReachable, refusal

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
    from gateway import terminal

    if as_json:
        click.echo(raw)
    else:
        terminal.say(words.format_map(json.loads(raw)))


# Watching -------------------------------------------------------------------------------------


@click.command()
@_remote
@click.option("--types", default="", metavar="A,B", help="Only events of these types.")
def events(gateway: Remote, as_json: bool, types: str) -> None:
    """Follow what happens, until Ctrl-C. With --json, one object per line: id, event, data.

    After a drop it connects again and goes on behind the last event.
    """
    from gateway import terminal

    for event in gateway.follow(types, terminal.tell):
        if as_json:
            names = f'"id":{json.dumps(event.id)},"event":{json.dumps(event.name)}'
            click.echo(f'{{{names},"data":{event.data}}}')
        else:
            terminal.show(terminal.event(event.name, json.loads(event.data)))


@click.command()
@_remote
def status(gateway: Remote, as_json: bool) -> None:
    """Tell whether all is well, and what runs now."""
    from gateway import terminal

    raw = gateway.get("/debug/status")
    if as_json:
        click.echo(raw)
        return
    told = json.loads(raw)
    health = json.loads(gateway.get("/health"))
    lines = {
        "Gateway": f"{gateway.url}, version {health['version']}, {health['status']}",
        "LM Studio": _connection(health["lmstudio"]),
        "State": _connection(health["state"]),
        "Active": terminal.active(told["activeModel"]),
        "Now": f"{told['status']}, {len(told['inFlight'])} in flight",
        "Requests": f"{told['totalRequests']}, {told['totalErrors']} errors",
    }
    for name, text in lines.items():
        terminal.say(f"{name + ':':10} {text}")


@click.command()
@_remote
@click.option("--once", is_flag=True, help="Print one view and end.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="From one look to the next; rates are over it.",
)
def top(gateway: Remote, as_json: bool, once: bool, interval: float) -> None:
    """Watch requests and rates live, until Ctrl-C.

    With --json, the JSON of "status" at every interval.
    """
    from gateway import terminal

    if as_json:
        click.echo(gateway.get("/debug/status"))
        while not once:
            time.sleep(interval)
            click.echo(gateway.get("/debug/status"))
        return
    views = _views(gateway, interval)
    if once:
        terminal.show(next(views))
    else:
        terminal.live(views)


def _views(gateway: Remote, interval: float) -> Iterator[Group]:
    """A view of each interval, without an end."""
    from gateway import terminal

    before = _Sample(gateway)
    while True:
        time.sleep(interval)
        now = _Sample(gateway)
        requests = now.rate(before, "totalRequests")
        tokens = now.rate(before, "totalTokensProcessed")
        each = now.performance["avgTokensPerSec"]
        yield terminal.activity(now.status, requests, tokens, each)
        before = now


class _Sample:
    """What the gateway says at one moment."""

    def __init__(self, gateway: Remote) -> None:
        self.status = json.loads(gateway.get("/debug/status"))
        self.performance = json.loads(gateway.get("/debug/metrics"))["performance"]
        self.moment = time.monotonic()

    def rate(self, before: _Sample, counter: str) -> float:
        """A counter's growth per second; a gateway that has started anew counts from 0."""
        grown = self.performance[counter] - before.performance[counter]
        return float(max(0, grown) / (self.moment - before.moment))


def _connection(told: dict[str, Any]) -> str:
    return "connected" if told["connected"] else f"not connected: {told.get('error')}"


#: What ``lmstudio-gateway`` offers beside running a gateway.
COMMANDS = (models, load, unload, activate, deactivate, events, status, top)
