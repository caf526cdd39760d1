"""The control paths below ``/_simulator/``, by which tests steer and question the simulator."""

from __future__ import annotations

import json
from dataclasses import asdict
from urllib.parse import parse_qs

from gateway.simulator.delivery import Answer, json_answer
from gateway.simulator.state import Simulator

PREFIX = "/_simulator/"


def control(simulator: Simulator, method: str, target: str, body: bytes) -> Answer:
    """Answer one control request; these are never recorded nor hindered by a fault."""
    path, _, query = target.partition("?")
    match method, path.removeprefix(PREFIX):
        case "GET", "faults":
            return json_answer(asdict(simulator.faults.switches))
        case "POST", "faults":
            return _change_faults(simulator, body)
        case "POST", "reset":
            simulator.reset()
            return json_answer({"reset": True})
        case "GET", "state":
            return json_answer(simulator.report())
        case "GET", "requests":
            since = int(parse_qs(query).get("since", ["0"])[0])
            return json_answer({"requests": simulator.journal.since(since)})
    return json_answer({"error": f"no such control path: {method} {path}"}, 404)


def _change_faults(simulator: Simulator, body: bytes) -> Answer:
    try:
        wanted = dict(json.loads(body))
        drop = wanted.pop("drop_sockets", False)
        simulator.faults.change(wanted)
    except (ValueError, TypeError) as error:
        return json_answer({"error": str(error)}, 400)
    if drop:
        simulator.drop_sockets()
    return json_answer(asdict(simulator.faults.switches))
