"""Runs work where killing the greenlet that waits for it does not interrupt it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import gevent

_P = ParamSpec("_P")
_T = TypeVar("_T")


def apart(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run ``work`` in a greenlet of its own, and return or raise what it does.

    A client that disconnects kills the greenlet of its request, at any moment. The SDK does not
    survive that: it would leave calls pending, and a connection attempt that others wait for would
    fail.
    """

    def guarded() -> tuple[_T | None, BaseException | None]:
        # gevent prints the traceback of any exception that escapes from a greenlet
        try:
            return work(*args, **kwargs), None
        except BaseException as error:
            return None, error

    result, error = gevent.spawn(guarded).get()
    if error is not None:
        raise error
    return cast(_T, result)
