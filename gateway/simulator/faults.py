"""What goes wrong on purpose: switches for the whole simulator, and knobs of one HTTP request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from gevent.event import Event

#: Request faults that spoil the answer; the exchange is recorded with the outcome ``fault``.
SPOILING = frozenset(
    {
        "refuse-500", "error-string-500", "status-429", "close-before-head", "garbage-head",
        "break-stream", "break-plain", "error-in-stream-event", "error-in-stream-data",
        "error-200", "error-200-object", "error-200-stream", "silent-stream",
    }
)  # fmt: skip
#: Request faults that only change how a right answer travels.
SHAPING = frozenset({"gzip", "split-bytes", "crlf", "big-answer", "one-chunk", "no-length"})


@dataclass
class Switches:
    """The faults of ``POST /_simulator/faults``; every field is one switch."""

    refuse_websockets: bool = False  #: 503 to every WebSocket upgrade
    silent_after_upgrade: bool = False  #: the authentication frame is never answered
    silent_rpc: bool = False  #: no RPC is answered
    silent_http: bool = False  #: ``/v1`` and the greeting hang until this is off
    fail_loads: str | None = None  #: every load fails with this cause
    slow_rpc_ms: int = 0  #: delay of each RPC answer
    load_ms: int = 0  #: how long a load takes, instead of what its model says
    unknown_model_type: bool = False  #: two models that the SDK's types don't know are listed


class Faults:
    """The current switches, and the gate at which silent HTTP requests wait."""

    def __init__(self) -> None:
        self.switches = Switches()
        self.http_open = Event()
        self.http_open.set()

    def change(self, wanted: dict[str, Any]) -> None:
        """Set the named switches.

        :raises ValueError: for a name that is none, or a value of the wrong type.
        """
        merged = asdict(self.switches) | wanted
        for field in fields(Switches):
            value = merged[field.name]
            if field.name == "fail_loads":
                fits = value is None or isinstance(value, str)
            else:
                fits = type(value) is type(field.default)
            if not fits:
                raise ValueError(f"bad value for {field.name}: {value!r}")
        if unknown := set(merged) - {field.name for field in fields(Switches)}:
            raise ValueError(f"no such fault: {', '.join(sorted(unknown))}")
        self.switches = Switches(**merged)
        if self.switches.silent_http:
            self.http_open.clear()
        else:
            self.http_open.set()

    def reset(self) -> None:
        """Switch everything off."""
        self.change(asdict(Switches()))


@dataclass(frozen=True)
class Knobs:
    """The ``X-Simulator-*`` headers of one request; all times in seconds."""

    pace: float
    prefill: float = 0.0
    head_delay: float = 0.0
    faults: frozenset[str] = frozenset()

    @classmethod
    def from_headers(cls, header: Callable[[str], str | None], default_pace_ms: float) -> Knobs:
        """Read the headers.

        :raises ValueError: for a number that is none or an unknown fault, so that a test with a
            typing error doesn't pass by accident.
        """
        names = (header("x-simulator-fault") or "").split(",")
        faults = frozenset(name.strip() for name in names if name.strip())
        if unknown := faults - SPOILING - SHAPING:
            raise ValueError(f"no such fault: {', '.join(sorted(unknown))}")

        def seconds(name: str, default_ms: float) -> float:
            return float(header(f"x-simulator-{name}-ms") or default_ms) / 1000

        return cls(
            seconds("pace", default_pace_ms),
            seconds("prefill", 0),
            seconds("head-delay", 0),
            faults,
        )

    def has(self, fault: str) -> bool:
        """Say whether this fault was asked for."""
        return fault in self.faults

    @property
    def spoiled(self) -> bool:
        """Whether the answer is spoiled, not merely shaped."""
        return bool(self.faults & SPOILING)
