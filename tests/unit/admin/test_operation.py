"""The events of an operation wait for its client in bounded memory."""

from __future__ import annotations

import gevent

from gateway.admin.operation import Events, Operation


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


def test_the_progress_of_a_load_whose_client_reads_nothing_takes_no_memory() -> None:
    published: list[str] = []

    def work(emit: object) -> dict[str, object]:
        for number in range(10_000):
            emit("model_load_progress", {"progress": number})  # type: ignore[operator]
        emit("model_load_complete", {"modelKey": "m"})  # type: ignore[operator]
        return {"status": "loaded"}

    operation = Operation(work, lambda event, data: published.append(event))
    stream = operation.events({}, "r")
    assert next(stream) == b""
    with gevent.Timeout(20):
        while "model_load_complete" not in published:
            gevent.sleep(0.005)
    assert len(operation._events) <= 3
    text = b"".join(stream).decode()
    assert text.count("event: model_load_progress") == 1
    assert '"progress":9999' in text
    assert "event: model_load_complete" in text
