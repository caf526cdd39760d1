"""The settings of §1 of the contract, from the environment and from ``.env``.

:mod:`.table` declares every setting and is the file to read first; it feeds parsing, error lines
and the tests of the documentation. :mod:`.parsers` turns texts into values, :mod:`.loading` reads
the environment and refuses what must not be served.

This package must not know about anything else of the gateway.
"""

from gateway.settings.loading import (
    SettingsError,
    is_loopback,
    load,
    read_env_file,
    read_environment,
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
    "load",
    "parse_keys",
    "read_env_file",
    "read_environment",
]
