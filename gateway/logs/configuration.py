"""Configures logging: gunicorn's messages and the gateway's in one format, text or JSON lines."""

from __future__ import annotations

import json
import logging
from typing import Any

from gateway.clock import timestamp
from gateway.logs import stderr

LEVELS = {"error": "ERROR", "warn": "WARNING", "info": "INFO", "debug": "DEBUG"}


class TextFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.000Z info gateway.app: message``."""

    def format(self, record: logging.LogRecord) -> str:
        when, level = timestamp(record.created), record.levelname.lower()
        line = f"{when} {level} {record.name}: {record.getMessage()}"
        return line if not record.exc_info else f"{line}\n{self.formatException(record.exc_info)}"


class JsonFormatter(logging.Formatter):
    """One JSON object per line, with ``timestamp``, ``level``, ``logger`` and ``message``."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "timestamp": timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class Handler(logging.Handler):
    """Writes each line to :mod:`.stderr`. Needs no lock, as that is safe by itself."""

    def createLock(self) -> None:
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stderr.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


def set_level(level: str) -> None:
    """Change the level of the gateway's own messages and gunicorn's; ``level`` is ``LOG_LEVEL``."""
    for name in ("gateway", "gunicorn.error"):
        logging.getLogger(name).setLevel(LEVELS[level])


def configuration(level: str, form: str) -> dict[str, Any]:
    """A configuration for ``logging.config.dictConfig``.

    ``level`` and ``form`` are the values of ``LOG_LEVEL`` and ``LOG_FORMAT``.
    """
    formatter = JsonFormatter if form == "json" else TextFormatter
    handler = {"()": Handler, "formatter": "line"}
    chosen = LEVELS[level]
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": formatter}},
        "handlers": {"stderr": handler},
        # libraries log too much: only their warnings matter to an operator
        "root": {"level": "WARNING", "handlers": ["stderr"]},
        "loggers": {
            "gateway": {"level": chosen},
            "gunicorn.error": {"level": chosen, "handlers": [], "propagate": True},
            "gunicorn.access": {"level": "CRITICAL", "handlers": [], "propagate": False},
        },
    }
