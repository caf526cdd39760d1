"""What the commands that ask a running gateway have in common: options, bodies, exit statuses.

Each ends with an exit status that scripts can rely on: 0 done, 1 the gateway answered an error,
2 wrong usage, 3 the gateway can't be reached, 4 not allowed, 130 interrupted. Imports of requests
and rich (:mod:`.client`, :mod:`.terminal`) stand inside functions, so that ``serve`` starts without
them.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from gateway import __version__

if TYPE_CHECKING:
    pass

INTERRUPTED = 130


def remote_command(function: Callable[..., None]) -> Callable[..., None]:
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
            from gateway.commands.client import Remote, RemoteError
            from gateway.commands.terminal import tell

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


def inference_options(function: Callable[..., None]) -> Callable[..., None]:
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
    body = activation_body(model, **others)
    if config:
        body["loadConfig"] = config
    if ttl is not None:
        body["ttlSeconds"] = ttl
    if no_activate:
        body["activate"] = False
    return body


def activation_body(
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
