"""LM Studio going away or coming back is reported once, however many workers notice it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import EventReader
from tests.processes import Gateway, Simulator, eventually, free_port


@pytest.fixture
def simulators() -> Iterator[list[Simulator]]:
    """The list of a test's own simulators, which are stopped at its end."""
    started: list[Simulator] = []
    yield started
    for simulator in started:
        if simulator.process.poll() is None:
            simulator.stop()


def lines(gateway: Gateway, text: str) -> int:
    return gateway.logged().count(text)


def test_going_away_and_coming_back_is_one_event_and_one_line_for_all_workers(
    tmp_path: Path, state_url: str, simulators: list[Simulator], listen: Any
) -> None:
    port = free_port()
    simulators.append(Simulator(port))
    gateway = Gateway(
        tmp_path, simulators[0].url, STATE_URL=state_url, WEB_CONCURRENCY=3, SDK_RETRY_DELAY=10
    )
    try:
        reader: EventReader = listen(gateway, "?types=host_state")
        # each worker has a socket then, and notices its end
        eventually(
            lambda: (
                gateway.get("/admin/models", headers={"Connection": "close"}).ok
                and simulators[0].state()["sockets"].get("system") == 3
            )
        )
        for round_ in (1, 2):
            simulators[-1].stop()
            down = reader.until("host_state", round_, state="down")
            assert down["host"] == "default"
            assert down["reason"]
            assert gateway.get("/admin/models").status_code == 503
            simulators.append(Simulator(port))
            up = reader.until("host_state", round_, state="up")
            assert "reason" not in up
            eventually(lambda: gateway.get("/admin/models").ok)
        states = [change["state"] for change in reader.of("host_state")]
        assert states == ["down", "up"] * 2
        assert lines(gateway, "LM Studio is down: ") == 2
        assert lines(gateway, "LM Studio is up again") == 2
        assert lines(gateway, "LM Studio's SDK can't be connected to") >= 1
    finally:
        gateway.stop()


def test_a_gateway_that_starts_later_notices_that_lm_studio_came_back(
    tmp_path: Path, simulators: list[Simulator], listen: Any
) -> None:
    port = free_port()
    gateway = Gateway(tmp_path, f"http://127.0.0.1:{port}", SDK_RETRY_DELAY=10)
    reader: EventReader = listen(gateway)
    assert gateway.get("/health").json()["status"] == "degraded"
    reader.until("host_state", state="down")
    gateway.stop()
    simulators.append(Simulator(port))
    gateway.start()
    try:
        reader = listen(gateway, last_id=0)
        reader.until("host_state", state="up")
    finally:
        gateway.stop()
