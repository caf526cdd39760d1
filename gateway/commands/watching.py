"""The commands that watch a running gateway."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from gateway.commands.options import remote_command

if TYPE_CHECKING:
    from rich.console import Group

    from gateway.commands.client import Remote


@click.command()
@remote_command
@click.option("--types", default="", metavar="A,B", help="Only events of these types.")
def events(gateway: Remote, as_json: bool, types: str) -> None:
    """Follow the events until Ctrl-C. With --json, one object per line: id, event, data.

    It reconnects after a lost connection and continues after the last event.
    """
    from gateway.commands import terminal

    for event in gateway.follow(types, terminal.echo_error):
        if as_json:
            names = f'"id":{json.dumps(event.id)},"event":{json.dumps(event.name)}'
            terminal.echo_json(f'{{{names},"data":{event.data}}}')
        else:
            terminal.show(terminal.event(event.name, json.loads(event.data)))


@click.command()
@remote_command
def status(gateway: Remote, as_json: bool) -> None:
    """Show the gateway's health and what it is doing."""
    from gateway.commands import terminal

    raw = gateway.get("/debug/status")
    if as_json:
        terminal.echo_json(raw)
        return
    status = json.loads(raw)
    health = json.loads(gateway.get("/health"))
    lines = {
        "Gateway": f"{gateway.url}, version {health['version']}, {health['status']}",
        "LM Studio": _connection(health["lmstudio"]),
        "State": _connection(health["state"]),
        "Active": terminal.active(status["activeModel"]),
        "Now": f"{status['status']}, {len(status['inFlight'])} in flight",
        "Requests": f"{status['totalRequests']}, {status['totalErrors']} errors",
    }
    for name, text in lines.items():
        terminal.echo(f"{name + ':':10} {text}")


@click.command()
@remote_command
@click.option("--once", is_flag=True, help="Print one view and exit.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two updates, over which rates are averaged.",
)
def top(gateway: Remote, as_json: bool, once: bool, interval: float) -> None:
    """Watch requests and rates live until Ctrl-C.

    With --json, prints the JSON of "status" at every interval.
    """
    from gateway.commands import terminal

    if as_json:
        terminal.echo_json(gateway.get("/debug/status"))
        while not once:
            time.sleep(interval)
            terminal.echo_json(gateway.get("/debug/status"))
        return
    views = _views(gateway, interval)
    if once:
        terminal.show(next(views))
    else:
        terminal.live(views)


def _views(gateway: Remote, interval: float) -> Iterator[Group]:
    """Yield a view of each interval, forever."""
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
    """The gateway's status and counters at one moment."""

    def __init__(self, gateway: Remote) -> None:
        self.status = json.loads(gateway.get("/debug/status"))
        self.performance = json.loads(gateway.get("/debug/metrics"))["performance"]
        self.moment = time.monotonic()

    def rate(self, before: _Sample, counter: str) -> float:
        """A counter's growth per second; 0 if a restart has reset it."""
        grown = self.performance[counter] - before.performance[counter]
        return float(max(0, grown) / (self.moment - before.moment))


def _connection(health: dict[str, Any]) -> str:
    return "connected" if health["connected"] else f"not connected: {health.get('error')}"


COMMANDS = (events, status, top)
