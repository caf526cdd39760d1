"""The commands that watch a running gateway over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Group

    from gateway.commands.client import Remote
from gateway.commands.options import remote_command


@click.command()
@remote_command
@click.option("--types", default="", metavar="A,B", help="Only events of these types.")
def events(gateway: Remote, as_json: bool, types: str) -> None:
    """Follow what happens, until Ctrl-C. With --json, one object per line: id, event, data.

    After a drop it connects again and goes on behind the last event.
    """
    from gateway.commands import terminal

    for event in gateway.follow(types, terminal.tell):
        if as_json:
            names = f'"id":{json.dumps(event.id)},"event":{json.dumps(event.name)}'
            click.echo(f'{{{names},"data":{event.data}}}')
        else:
            terminal.show(terminal.event(event.name, json.loads(event.data)))


@click.command()
@remote_command
def status(gateway: Remote, as_json: bool) -> None:
    """Tell whether all is well, and what runs now."""
    from gateway.commands import terminal

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
@remote_command
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
    from gateway.commands import terminal

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
    from gateway.commands import terminal

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


COMMANDS = (events, status, top)
