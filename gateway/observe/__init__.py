"""Collects what happens in the gateway and reports it: metrics, events and the access log.

A :class:`Record` collects the facts of one exchange; :mod:`.reporting` reports it to metrics,
events and the access log, and is the file to read first. :mod:`.events` publishes to the shared
event log, :mod:`.readers` streams it to clients, and :mod:`.counters` adds up the counters of all
workers and machines.

This package must not know about Flask, about the content of requests or about LM Studio.
"""

from gateway.observe.access_log import AccessLog
from gateway.observe.counters import total_counters
from gateway.observe.events import TYPES, EventBus
from gateway.observe.hosts import HostReporter
from gateway.observe.metrics import LOST, PREFIX, Metrics
from gateway.observe.pages import SharedPages
from gateway.observe.readers import Subscription
from gateway.observe.record import Record, milliseconds
from gateway.observe.reporting import Reporter

__all__ = [
    "LOST",
    "PREFIX",
    "TYPES",
    "AccessLog",
    "EventBus",
    "HostReporter",
    "Metrics",
    "Record",
    "Reporter",
    "SharedPages",
    "Subscription",
    "milliseconds",
    "total_counters",
]
