"""The command ``lmstudio-gateway``."""

from __future__ import annotations

import sys
from typing import Any

import click

from gateway import version
from gateway.commands import models, watching


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(f"lmstudio-gateway, version {version.identity()}")
        context.exit()


# click's own version_option needs the text when this module is imported
@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and the commit, and exit.",
)
def main() -> None:
    """A gateway in front of LM Studio.

    "demo" shows it without LM Studio. "check" and "serve" take their settings from the environment
    and from .env in the current directory (README.rst lists them). The other commands talk to a
    running gateway.
    """


@main.command()
@click.option(
    "--server",
    "kind",
    type=click.Choice(["gunicorn", "gevent"]),
    default="gevent" if sys.platform == "win32" else "gunicorn",
    show_default=True,
    help="gevent serves from one process and also works where gunicorn does not.",
)
def serve(kind: str) -> None:
    """Serve with the settings from the environment and .env."""
    from gevent import monkey

    monkey.patch_all()  # in gunicorn's master, whose imports the workers inherit
    from gateway import serving

    settings = serving.checked_settings_or_exit()
    (serving.serve_gevent if kind == "gevent" else serving.serve_gunicorn)(settings)


@main.command()
def check() -> None:
    """Check the settings, the shared state and the connection to LM Studio.

    The exit status is 0 if everything works, else 1.
    """
    from gevent import monkey

    monkey.patch_all()
    from gateway.commands import checks
    from gateway.serving import settings_or_exit

    sys.exit(checks.run(settings_or_exit()))


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=1234, show_default=True, help="0 picks a free port.")
@click.option("--token", help="Require this API token (sk-lm-AAAAAAAA:BBBBBBBBBBBBBBBBBBBB).")
@click.option("--pace-ms", default=20.0, show_default=True, help="Milliseconds between two tokens.")
@click.option("--tls-cert", help="PEM certificate; serves https and wss.")
@click.option("--tls-key", help="PEM key of that certificate.")
def simulate(**options: Any) -> None:
    """Run a simulator of LM Studio, without a model, for trials and tests.

    It listens on LM Studio's own address by default.
    """
    from gevent import monkey

    monkey.patch_all()
    from gateway.simulator.server import serve

    try:
        serve(**options)
    except OSError as error:  # the port is in use, or the certificate does not exist
        raise click.ClickException(f"The simulator can't start: {error}") from None


@main.command()
@click.option("--once", is_flag=True, help="Exit after the tour instead of running until Ctrl-C.")
def demo(once: bool) -> None:
    """Show the gateway at work, without LM Studio.

    It starts the simulator and a gateway in front of it, lists models, loads one and chats.
    """
    from gateway.commands import demo as tour

    sys.exit(tour.run(once=once))


for command in (*models.COMMANDS, *watching.COMMANDS):
    main.add_command(command)
