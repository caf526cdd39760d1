"""Notices that LM Studio goes away or comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import gevent
from gevent.event import Event

from gateway.errors import GatewayError

HostState = Literal["up", "down"]

#: Seconds that LM Studio has to answer.
PROBE_TIMEOUT = 5.0
#: Seconds between two probes while LM Studio is down, and the least between any two.
INTERVAL = 1.0
#: Seconds after which a failed probe is repeated before LM Studio counts as down.
CONFIRM_AFTER = 0.25


class Monitor:
    """Probes LM Studio when somebody suspects that it went away, and from then on until it is back.

    ``probe`` takes a timeout in seconds and raises a GatewayError. ``report`` gets the state that
    each probe finds, with the reason for ``down``; most of its calls tell nothing new.
    """

    def __init__(
        self,
        probe: Callable[[float], None],
        report: Callable[[HostState, str], None],
    ) -> None:
        self._probe = probe
        self._report = report
        self._suspected = Event()

    def suspect(self) -> None:
        """Something went wrong that a lost LM Studio would explain. May be called from anywhere."""
        self._suspected.set()

    def run(self) -> None:
        """Probe for the life of the worker, in a greenlet of its own."""
        is_up = True
        while True:
            if is_up:
                self._suspected.wait()
            is_up = self._check()
            self._suspected.clear()  # the probe's own failures among them
            gevent.sleep(INTERVAL)

    def _check(self) -> bool:
        reason = self._fault()
        if reason:
            gevent.sleep(CONFIRM_AFTER)
            reason = self._fault()
        self._report("down" if reason else "up", reason)
        return not reason

    def _fault(self) -> str:
        """Why LM Studio does not answer; empty if it does."""
        try:
            self._probe(PROBE_TIMEOUT)
        except GatewayError as error:
            return error.message
        return ""
