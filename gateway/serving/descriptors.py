"""The process's limit of open file descriptors, and when they run short."""

from __future__ import annotations

import logging

try:
    import resource
except ImportError:  # Windows, where sockets do not count against such a limit
    resource = None  # type: ignore[assignment]

#: The part of the limit above which descriptors count as short. The rest is for connections to LM
#: Studio and for files.
PRESSURE = 0.8

logger = logging.getLogger(__name__)


def raise_limit() -> None:
    """Raise the soft limit to the hard one; workers inherit it."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as fault:
        logger.warning("the limit of %d open files can't be raised to %d: %s", soft, hard, fault)


def are_short(newest: int) -> bool:
    """Whether descriptors run short, judged by the newest one.

    The kernel gives out the lowest number that is free, so that at least as many are open.
    """
    if resource is None:
        return False
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft != resource.RLIM_INFINITY and newest >= PRESSURE * soft
