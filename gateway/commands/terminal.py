"""What the commands show: tables, a bar, a live view; plain lines where stdout is no terminal."""

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

#: Columns of what goes into a file or a pipe: as many as it takes.
_UNLIMITED = 10_000

_STYLES = {"error": "bold red", "gap": "bold red", "inference": "cyan", "model": "green"}


def tell(text: str) -> None:
    """Say something on stderr."""
    click.echo("\n".join(map(clean, text.split("\n"))), err=True)


def say(text: str) -> None:
    """Say something on stdout."""
    click.echo(clean(text))


def show(view: RenderableType) -> None:
    """Print what the functions below make; a line stays one however long it is."""
    _console().print(view, soft_wrap=isinstance(view, Text))


@contextmanager
def progress(what: str) -> Iterator[Callable[[float], None]]:
    """Show a progress of 0-100: a bar in a terminal, else a line for every ten percent."""
    what = clean(what)
    console = _console()
    if console.is_terminal:
        name = TextColumn("{task.description}", markup=False)
        columns = (name, BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=100)
            yield lambda percent: bar.update(task, completed=percent)
        return
    told = -1

    def line(percent: float) -> None:
        nonlocal told
        if percent // 10 > told:
            told = int(percent // 10)
            click.echo(f"{what}: {percent:.0f} %")

    yield line


def live(views: Iterator[RenderableType]) -> None:
    """Show each view in the place of the one before; without a terminal, one below the other."""
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
        # what other commands take stands in front: it is kept in one piece where it can be
        made.add_column(name, overflow="fold", no_wrap=name == columns[0])
    return made


def row(to: Table, *cells: Any) -> None:
    """Add a row; nothing is shown as ``-``."""
    to.add_row(*("-" if cell in (None, "") else Text(clean(str(cell))) for cell in cells))


def listing(told: dict[str, Any]) -> Group:
    """``GET /admin/models``."""
    loaded = table("LOADED", "MODEL", "TYPE", "CONTEXT", "TTL")
    for one in told["loaded"]:
        ttl = f"{one['ttlMs'] / 1000:g} s" if one.get("ttlMs") else None
        row(loaded, one["identifier"], one["modelKey"], one["type"], one["contextLength"], ttl)
    downloaded = table("DOWNLOADED", "TYPE", "PARAMS", "QUANT", "SIZE", "CONTEXT")
    for one in told["downloaded"]:
        quantization = (one.get("quantization") or {}).get("name")
        size = f"{one['size'] / 1e9:.2f} GB" if one.get("size") else None
        described = (one.get("paramsString"), quantization, size, one.get("maxContextLength"))
        row(downloaded, one["modelKey"], one["type"], *described)
    return Group(Text(f"Active: {active(told['active'])}\n"), loaded, Text(), downloaded)


def event(name: str, told: dict[str, Any]) -> Text:
    """One event of the stream in a line, with the time of day here."""
    moment = datetime.fromisoformat(told.pop("timestamp")).astimezone()
    line = Text(f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03} ")
    style = _STYLES.get(name) or _STYLES.get(name.partition("_")[0], "dim")
    return line.append(f"{clean(name):22}", style).append(f" {members(told)}")


def activity(
    status: dict[str, Any], requests: float, tokens: float, tokens_each: float | None
) -> Group:
    """``GET /debug/status`` with rates per second, and the average tokens/s of an answer."""
    running = table("REQUEST", "CLIENT", "WHAT", "MODEL", "ELAPSED", "TOKENS")
    for one in status["inFlight"]:
        what = one.get("path") or one["operation"]
        model = one.get("model") or one.get("modelKey")
        elapsed = f"{one['elapsedMs'] / 1000:.1f} s"
        row(
            running,
            one.get("requestId"),
            one.get("client"),
            what,
            model,
            elapsed,
            one.get("chunks"),
        )
    recent = table("ENDED", "STATUS", "TIME", "FIRST BYTE", "TOKENS", "TOKENS/S")
    for one in status["recentRequests"]:
        ended = "left" if one["cancelled"] else one["status"]
        times = [None if ms is None else f"{ms} ms" for ms in (one["totalTimeMs"], one["ttftMs"])]
        counted = one["tokenUsage"]["totalTokens"]
        row(recent, one["requestId"], ended, *times, counted, one["tokensPerSec"])
    each = "" if tokens_each is None else f" ({tokens_each:g} in an answer)"
    totals = f"{status['totalRequests']} requests and {status['totalErrors']} errors in all"
    head = f"{requests:.1f} requests/s, {tokens:.1f} tokens/s{each}; {totals}"
    count = f"{len(status['inFlight'])} in flight ({status['status']})"
    lines = (head, f"Active: {active(status['activeModel'])}", "", count)
    return Group(*map(Text, lines), running, Text(), recent)


def active(told: dict[str, Any] | None) -> str:
    """The active model in words."""
    if told is None:
        return "none"
    text = clean(str(told["modelKey"]))
    if told["instanceId"] not in (None, told["modelKey"]):
        text += f" as {clean(str(told['instanceId']))}"
    if told.get("loaded") is False:
        text += ", not loaded"
    if told["defaultInference"]:
        text += f" ({members(told['defaultInference'])})"
    return text


def members(told: dict[str, Any], prefix: str = "") -> str:
    """``name=value`` for everything that has a value, of nested objects too."""
    found = []
    for name, value in told.items():
        if isinstance(value, dict):
            found.append(members(value, f"{prefix}{clean(name)}."))
        elif value is not None:
            plain = isinstance(value, str) and " " not in value
            text = value if plain else json.dumps(value, ensure_ascii=False)
            found.append(f"{prefix}{clean(name)}={clean(text)}")
    return " ".join(filter(None, found))


def clean(text: str) -> str:
    """Text that can't steer a terminal: clients choose the names of models and requests."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@functools.cache
def _console() -> Console:
    """stdout, with the colours, width and moves of a terminal only where it is one."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = None if terminal else _UNLIMITED
    return Console(force_terminal=terminal, width=width, highlight=False, markup=False, emoji=False)
