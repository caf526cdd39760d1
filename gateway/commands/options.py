"""The common parts of the commands for a running gateway: options, request bodies, exit statuses.

Scripts can rely on the exit statuses: 0 success, 1 an error from the gateway, 2 wrong usage, 3 the
gateway can't be reached, 4 not allowed, 130 interrupted. requests and rich are heavy: the commands
import :mod:`.client` and :mod:`.terminal` inside functions, so that ``serve`` starts without them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import click

from gateway import __version__
from gateway.errors import loads

INTERRUPTED = 130


def remote_command(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--url``, ``--key`` and ``--json``, and the gateway as its first argument.

    Errors become messages on stderr and exit statuses.
    """

    @click.option("--url", help="The gateway's URL.  [GATEWAY_URL, else http://127.0.0.1:8002]")
    @click.option(
        "--key",
        help="An API key or admin key. Other users can see it in the process list;"
        " GATEWAY_ADMIN_KEY or GATEWAY_API_KEY in the environment or in .env is safer.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print the gateway's JSON as it is.")
    @functools.wraps(function)
    def run(url: str | None, key: str | None, **options: Any) -> None:
        for output in filter(None, (sys.stdout, sys.stderr)):  # None: the shell has closed it
            output.reconfigure(errors="backslashreplace")
        try:
            from gateway.commands.client import Remote, RemoteError
            from gateway.commands.terminal import echo_error

            function(Remote(url, key), **options)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except RemoteError as error:
            echo_error(f"Error: {error}")
            sys.exit(error.exit_status)
        except (LookupError, TypeError, ValueError) as error:
            hint = f"Is the gateway's version close to {__version__}?"
            echo_error(f"Error: Unexpected response ({error!r}). {hint}")
            sys.exit(1)

    return run


def inference_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that make up ``defaultInference``."""
    field = click.option(
        "--default",
        "defaults",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Any other field of defaultInference, e.g. topP=0.9. Repeatable.",
    )
    limit = click.option("--max-tokens", type=int, help="Default limit of generated tokens.")
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
    """The body of ``POST /admin/models/load``; UsageError for a malformed or repeated field."""
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
    """The body of ``POST /admin/models/activate``, which is also part of every load's body."""
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
    """Set the given options, and the field of each ``FIELD=VALUE`` of ``option``."""
    for field, value in options.items():
        if value is not None:
            _put(target, field, value)
    for assignment in assignments:
        field, equals, text = assignment.partition("=")
        if not equals or not all(field.split(".")):
            raise click.UsageError(f"{option} {assignment}: must be FIELD=VALUE.")
        _put(target, field, _value(text))


def _put(target: dict[str, Any], field: str, value: Any) -> None:
    """Set a field, where ``a.b`` is field ``b`` of the object ``a``."""
    *outer, last = field.split(".")
    for name in outer:
        target = target.setdefault(name, {})
        if not isinstance(target, dict):
            raise click.UsageError(f"{field}: {name} already has a value of its own.")
    if last in target:
        raise click.UsageError(f"{field}: given twice.")
    target[last] = value


def _value(text: str) -> Any:
    """The value of a text that is JSON, otherwise the text itself."""
    try:
        return loads(text)
    except (ValueError, RecursionError):
        return text
