"""Warnings that a flood of the same kind must not repeat without end."""

from __future__ import annotations

import logging
import time

from gateway.clock import timestamp

#: Seconds within which a kind of warning is logged once.
INTERVAL = 60.0


class Throttle:
    """Logs at most one warning of each kind per ``interval`` seconds.

    The warnings in between are counted, and the next one of their kind gives their number. A kind
    is a constant of the code, never a client's text, as each is remembered.
    """

    def __init__(self, logger: logging.Logger, interval: float = INTERVAL) -> None:
        self._logger = logger
        self._interval = interval
        #: When each kind was last logged: as a time.monotonic() and as a time.time().
        self._logged: dict[str, tuple[float, float]] = {}
        self._suppressed: dict[str, int] = {}

    def warning(self, kind: str, message: str, *args: object) -> None:
        """Log a warning, or count it if one of its kind was logged a short time ago."""
        now = time.monotonic()
        last, wall = self._logged.get(kind, (None, 0.0))
        if last is not None and now - last < self._interval:
            self._suppressed[kind] = self._suppressed.get(kind, 0) + 1
            return
        self._logged[kind] = now, time.time()
        text = message % args if args else message
        suppressed = self._suppressed.pop(kind, 0)
        if suppressed:
            text += f" ({suppressed} more since {timestamp(wall)[11:19]})"
        self._logger.warning("%s", text)
