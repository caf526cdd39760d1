"""Reading the settings again, in place, on SIGHUP: no worker is replaced and nothing is cut.

The process that gets the signal reads ``.env`` and validates it. Under gunicorn that is the master,
which hands the result to its workers through shared memory, so that all of them apply the same
settings, also those that start later and whatever ``.env`` says by then.
"""

from __future__ import annotations

import json
import logging
import mmap
import signal
import struct
from collections.abc import Mapping
from typing import Any

from gateway import logs
from gateway.settings import (
    TABLE,
    Settings,
    SettingsError,
    leave_to_workers,
    load,
    read_environment,
)

#: What only a start applies: sockets, processes, the store and the connections of the workers.
RESTART_ONLY = (
    "GATEWAY_HOST",
    "GATEWAY_PORT",
    "WEB_CONCURRENCY",
    "STATE_URL",
    "LMSTUDIO_BASE_URL",
    "LOG_FORMAT",
)
_NAMES = (*(setting.variable for setting in TABLE), "WEB_CONCURRENCY")
_HEADER = struct.Struct("=Q")
_PAGE_BYTES = 1 << 20

logger = logging.getLogger(__name__)

Environment = dict[str, str]


class SettingsPage:
    """The environment that was validated last, in memory that the workers share.

    To be created before the fork. The master writes while no worker reads: it signals them after.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _PAGE_BYTES)

    def write(self, environment: Mapping[str, str]) -> None:
        """Replace the content. Raises SettingsError if it is too large."""
        content = json.dumps(dict(environment)).encode()
        if len(content) + _HEADER.size > _PAGE_BYTES:
            raise SettingsError([".env: is larger than one megabyte"])
        self._memory[_HEADER.size : _HEADER.size + len(content)] = content
        _HEADER.pack_into(self._memory, 0, len(content))

    def settings(self) -> Settings | None:
        """The settings that the content means; None before the first reload."""
        (length,) = _HEADER.unpack_from(self._memory, 0)
        if not length:
            return None
        return load(json.loads(self._memory[_HEADER.size : _HEADER.size + length]))


class Reloader:
    """Reads the settings again, in the process that gets SIGHUP."""

    def __init__(self) -> None:
        #: What the gateway runs with: the variables that are settings, with their texts.
        self.environment = _relevant(read_environment())

    def reload(self) -> Environment | None:
        """Read and validate the settings; returns the environment that counts from now on.

        Bad settings are reported in the log and change nothing: None. So are settings that only a
        restart applies: they stay as they are.
        """
        try:
            found = _relevant(read_environment())
            settings = load(found)
        except SettingsError as error:
            for problem in error.problems:
                logger.error("settings not reloaded: %s", problem)
            return None
        changed = [name for name in _NAMES if found.get(name) != self.environment.get(name)]
        for name in RESTART_ONLY:
            if name in changed:
                logger.warning("%s has changed: the change needs a restart", name)
                _put(found, name, self.environment.get(name))
        logs.set_level(settings.log_level)
        applied = [name for name in changed if name not in RESTART_ONLY]
        logger.info("Settings reloaded (changed: %s)", ", ".join(applied) or "none")
        self.environment = found
        return found


def reload_in_place(arbiter: Any) -> None:
    """What gunicorn's master does on SIGHUP, in place of replacing its workers."""
    environment = arbiter.reloader.reload()
    if environment is None:
        return
    try:
        arbiter.settings_page.write(environment)
    except SettingsError as error:
        logger.error("settings not reloaded: %s", error)
        return
    leave_to_workers(environment)
    arbiter.kill_workers(signal.SIGUSR1)


def apply(parts: Any, settings: Settings) -> None:
    """Let a process serve with other settings, its log included."""
    parts.reconfigure(settings)
    logs.set_level(settings.log_level)


def _relevant(environment: Mapping[str, str]) -> Environment:
    return {name: environment[name] for name in _NAMES if name in environment}


def _put(environment: Environment, name: str, value: str | None) -> None:
    if value is None:
        environment.pop(name, None)
    else:
        environment[name] = value
