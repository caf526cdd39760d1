"""An operation is undone unless its client gets the whole response, and its memory is bounded."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import gevent
import pytest

from gateway.admin.operation import Events, Operation
from gateway.request import DELIVERED, REQUEST_ID, SOCKET

RESULT = {"instanceId": "one"}


class Case:
    """An operation whose client is one end of a pair of sockets."""

    def __init__(self) -> None:
        self.client, server = socket.socketpair()
        self.server = server
        self.environ: dict[str, Any] = {SOCKET: server, REQUEST_ID: "r", "PATH_INFO": "/x"}
        self.running: set[Operation] = set()
        self.undone: list[Any] = []
        self.published: list[str] = []

    def start(self, work: Any = lambda emit: dict(RESULT)) -> Operation:
        def publish(event: str, data: dict[str, Any]) -> None:
            self.published.append(event)

        return Operation(self.environ, work, self.undone.append, publish, self.running)

    def close(self) -> None:
        for operation in list(self.running):
            operation.close()  # stops watching the socket
        self.client.close()
        self.server.close()


@pytest.fixture
def case() -> Iterator[Case]:
    made = Case()
    yield made
    made.close()


def settle() -> None:
    """Let every greenlet that can run do so."""
    for _ in range(10):
        gevent.sleep(0)


def load(emit: Any) -> dict[str, Any]:
    emit("model_load_progress", {"progress": 50})
    emit("model_load_complete", {})
    return dict(RESULT)


def test_a_delivered_response_stays(case: Case) -> None:
    body = case.start().result()
    assert b"".join(body) == b'{"instanceId":"one"}'
    assert body.length == 20
    case.environ[DELIVERED] = True
    body.close()
    settle()
    assert (case.undone, case.running) == ([], set())


@pytest.mark.parametrize("pieces", [0, 1])
def test_a_response_that_was_not_sent_whole_is_undone_once(case: Case, pieces: int) -> None:
    body = case.start().result()
    for _ in range(pieces):
        next(body)
    body.close()
    body.close()
    settle()
    assert case.undone == [RESULT]


def test_a_client_that_disconnects_before_the_response_is_sent_gets_none(case: Case) -> None:
    body = case.start().result()
    case.client.close()
    with pytest.raises(ConnectionResetError):
        next(body)
    body.close()
    settle()
    assert case.undone == [RESULT]


def test_a_stream_ends_before_its_completion_if_the_client_has_disconnected(case: Case) -> None:
    body = case.start(load).events()
    assert next(body) == b""
    assert b"model_load_progress" in next(body)
    case.client.close()
    with pytest.raises(ConnectionResetError):
        next(body)
    body.close()
    settle()
    assert case.undone == [RESULT]


def test_work_whose_head_could_not_be_sent_is_stopped(case: Case) -> None:
    ended: list[str] = []

    def work(emit: Any) -> dict[str, Any]:
        try:
            gevent.sleep(60)
        finally:
            ended.append("ended")
        return {}

    body = case.start(work).events()
    settle()
    body.close()  # without a single piece
    settle()
    assert (ended, case.undone) == (["ended"], [])


def test_work_that_finishes_while_it_is_stopped_is_undone(case: Case) -> None:
    def work(emit: Any) -> dict[str, Any]:
        with suppress(gevent.GreenletExit):  # it was too late to stop it
            gevent.sleep(60)
        return dict(RESULT)

    operation = case.start(work)
    body = operation.events()
    settle()
    body.close()
    settle()
    assert case.undone == [RESULT]


def test_an_aborted_operation_says_why(case: Case) -> None:
    operation = case.start(lambda emit: gevent.sleep(60))
    body = operation.events()
    assert next(body) == b""
    operation.abort("The gateway is shutting down.")
    (event,) = list(body)
    assert event.startswith(b"event: error\n")
    assert b'"The gateway is shutting down.","status":503' in event


def test_an_unexpected_failure_is_an_error_event_that_reveals_nothing(case: Case) -> None:
    def work(emit: Any) -> dict[str, Any]:
        raise KeyError("secret")

    body = case.start(work).events()
    _, event = list(body)
    assert event.startswith(b"event: error\n")
    assert b"secret" not in event


def test_of_progress_only_the_newest_waits() -> None:
    events = Events()
    events.put(("model_load_start", {}))
    for number in range(1000):
        events.put(("model_load_progress", {"progress": number}))
    events.put(("end", {}))
    assert len(events) == 3
    found = [events.get(1) for _ in range(3)]
    assert found == [
        ("model_load_start", {}),
        ("model_load_progress", {"progress": 999}),
        ("end", {}),
    ]
    assert events.get(0.01) is None


def test_a_waiting_client_gets_each_event_when_it_comes() -> None:
    events = Events()
    reader = gevent.spawn(lambda: [events.get(20) for _ in range(3)])
    sent = [("model_load_progress", {"progress": number}) for number in range(3)]
    for event in sent:
        gevent.sleep(0)
        events.put(event)
        gevent.sleep(0)
    assert reader.get(timeout=20) == sent


def test_the_progress_of_a_load_whose_client_reads_nothing_takes_no_memory(case: Case) -> None:
    def work(emit: Any) -> dict[str, Any]:
        for number in range(10_000):
            emit("model_load_progress", {"progress": number})
        emit("model_load_complete", {"modelKey": "m"})
        return {"status": "loaded"}

    operation = case.start(work)
    stream = operation.events()
    assert next(stream) == b""
    with gevent.Timeout(20):
        while "model_load_complete" not in case.published:
            gevent.sleep(0.005)
    assert len(operation._events) <= 3
    text = b"".join(stream).decode()
    assert text.count("event: model_load_progress") == 1
    assert '"progress":9999' in text
    assert "event: model_load_complete" in text
