"""The settings, read from the environment and ``.env``.

:mod:`.table` declares every setting and is the file to read first; parsing, error messages and the
tests of the documentation are based on it. :mod:`.parsers` converts text to values, and
:mod:`.loading` reads the environment and rejects unsafe settings.

This package must not know about any other part of the gateway.
"""

from gateway.settings.loading import (
    SettingsError,
    is_loopback,
    leave_to_workers,
    load,
    read_env_file,
    read_environment,
    warnings,
)
from gateway.settings.parsers import AddressSet, Key, parse_keys
from gateway.settings.table import TABLE, Setting, Settings

__all__ = [
    "TABLE",
    "AddressSet",
    "Key",
    "Setting",
    "Settings",
    "SettingsError",
    "is_loopback",
    "leave_to_workers",
    "load",
    "parse_keys",
    "read_env_file",
    "read_environment",
    "warnings",
]
