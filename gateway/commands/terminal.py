"""The commands' output: tables, a progress bar, a live view; plain lines outside a terminal."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

#: Columns of output to a file or a pipe: lines there are never wrapped.
_UNLIMITED = 10_000

_STYLES = {
    "error": "bold red",
    "gap": "bold red",
    "host": "bold yellow",
    "inference": "cyan",
    "model": "green",
}


def echo_error(text: str) -> None:
    """Print a message to stderr."""
    click.echo("\n".join(map(clean, text.split("\n"))), err=True)


def echo(text: str) -> None:
    """Print a line to stdout."""
    click.echo(clean(text))


def echo_json(text: str | bytes) -> None:
    """Print the gateway's JSON: unchanged, but on a terminal with control characters escaped."""
    if sys.stdout is not None and sys.stdout.isatty():
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        # JSON has them nowhere but in strings
        text = "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
    click.echo(text)


def show(view: RenderableType) -> None:
    """Print a table or line made by a function below, without wrapping lines."""
    _console().print(view, soft_wrap=isinstance(view, Text))


@contextmanager
def progress(title: str) -> Iterator[Callable[[float], None]]:
    """Show progress from 0 to 100: as a bar in a terminal, else as a line for every ten percent."""
    title = clean(title)
    console = _console()
    if console.is_terminal:
        name = TextColumn("{task.description}", markup=False)
        columns = (name, BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=100)
            yield lambda percent: bar.update(task, completed=percent)
        return
    printed = -1

    def line(percent: float) -> None:
        nonlocal printed
        if percent // 10 > printed:
            printed = int(percent // 10)
            click.echo(f"{title}: {percent:.0f} %")

    yield line


def live(views: Iterator[RenderableType]) -> None:
    """Show each view in place of the one before, or below it outside a terminal."""
    console = _console()
    if not console.is_terminal:
        for view in views:
            show(view)
        return
    with Live(console=console, screen=True, auto_refresh=False) as screen:
        for view in views:
            screen.update(view, refresh=True)


def table(*columns: str) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        # users copy the first column into other commands: never break it if it fits
        made.add_column(name, overflow="fold", no_wrap=name == columns[0])
    return made


def row(to: Table, *cells: Any) -> None:
    """Add a row; None and the empty string are shown as ``-``."""
    to.add_row(*("-" if cell in (None, "") else Text(clean(str(cell))) for cell in cells))


def listing(models: dict[str, Any]) -> Group:
    """The models of ``GET /admin/models``."""
    loaded = table("LOADED", "MODEL", "TYPE", "CONTEXT", "TTL")
    for one in models["loaded"]:
        ttl = f"{one['ttlMs'] / 1000:g} s" if one.get("ttlMs") else None
        row(loaded, one["identifier"], one["modelKey"], one["type"], one["contextLength"], ttl)
    downloaded = table("DOWNLOADED", "TYPE", "PARAMS", "QUANT", "SIZE", "CONTEXT")
    for one in models["downloaded"]:
        quantization = (one.get("quantization") or {}).get("name")
        size = f"{one['size'] / 1e9:.2f} GB" if one.get("size") else None
        details = (one.get("paramsString"), quantization, size, one.get("maxContextLength"))
        row(downloaded, one["modelKey"], one["type"], *details)
    return Group(Text(f"Active: {active(models['active'])}\n"), loaded, Text(), downloaded)


def event(name: str, data: dict[str, Any]) -> Text:
    """One event of the stream as a line, with its local time of day."""
    moment = datetime.fromisoformat(data.pop("timestamp")).astimezone()
    line = Text(f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03} ")
    style = _STYLES.get(name) or _STYLES.get(name.partition("_")[0], "dim")
    return line.append(f"{clean(name):22}", style).append(f" {members(data)}")


def activity(
    status: dict[str, Any], requests: float, tokens: float, tokens_each: float | None
) -> Group:
    """``GET /debug/status`` with rates per second, and the average tokens/s of a response."""
    in_flight = table("REQUEST", "CLIENT", "WHAT", "MODEL", "ELAPSED", "TOKENS")
    for one in status["inFlight"]:
        what = one.get("path") or one["operation"]
        model = one.get("model") or one.get("modelKey")
        elapsed = f"{one['elapsedMs'] / 1000:.1f} s"
        row(
            in_flight,
            one.get("requestId"),
            one.get("client"),
            what,
            model,
            elapsed,
            one.get("chunks"),
        )
    recent = table("ENDED", "STATUS", "TIME", "FIRST BYTE", "TOKENS", "TOKENS/S")
    for one in status["recentRequests"]:
        outcome = "cancelled" if one["cancelled"] else one["status"]
        times = [None if ms is None else f"{ms} ms" for ms in (one["totalTimeMs"], one["ttftMs"])]
        counted = one["tokenUsage"]["totalTokens"]
        row(recent, one["requestId"], outcome, *times, counted, one["tokensPerSec"])
    each = "" if tokens_each is None else f" ({tokens_each:g} per response)"
    totals = f"{status['totalRequests']} requests and {status['totalErrors']} errors in total"
    head = f"{requests:.1f} requests/s, {tokens:.1f} tokens/s{each}; {totals}"
    count = f"{len(status['inFlight'])} in flight ({status['status']})"
    lines = (head, f"Active: {active(status['activeModel'])}", "", count)
    return Group(*map(Text, lines), in_flight, Text(), recent)


def active(model: dict[str, Any] | None) -> str:
    """The active model as a phrase."""
    if model is None:
        return "none"
    text = clean(str(model["modelKey"]))
    if model["instanceId"] not in (None, model["modelKey"]):
        text += f" as {clean(str(model['instanceId']))}"
    if model.get("loaded") is False:
        text += ", not loaded"
    if model["defaultInference"]:
        text += f" ({members(model['defaultInference'])})"
    return text


def members(content: dict[str, Any], prefix: str = "") -> str:
    """``name=value`` for every member that is not null, also in nested objects."""
    found = []
    for name, value in content.items():
        if isinstance(value, dict):
            found.append(members(value, f"{prefix}{clean(name)}."))
        elif value is not None:
            plain = isinstance(value, str) and " " not in value
            text = value if plain else json.dumps(value, ensure_ascii=False)
            found.append(f"{prefix}{clean(name)}={clean(text)}")
    return " ".join(filter(None, found))


def clean(text: str) -> str:
    """Escape control characters: clients choose the names of models and requests."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@functools.cache
def _console() -> Console:
    """stdout, with colours, width and cursor movement only where it is a terminal."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = None if terminal else _UNLIMITED
    return Console(force_terminal=terminal, width=width, highlight=False, markup=False, emoji=False)
