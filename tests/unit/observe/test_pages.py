"""Pages of counters: what is counted is read, whoever dies and whenever it is read."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from gateway.observe import SharedPages
from gateway.observe.instruments import Instruments, total
from gateway.observe.pages import PAGE_BYTES, Cell, Page

LOST = {"flying": "errors", "readers": ""}


def in_child(work: Callable[[], None]) -> None:
    """Run something in a forked process, which then dies by SIGKILL."""
    pid = os.fork()
    if not pid:
        work()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def test_a_killed_process_leaves_what_it_counted() -> None:
    shared = SharedPages(2)

    def count() -> None:
        instruments = Instruments()
        before = instruments.counter("early", "Counted before the page was there.")
        before.inc(3)
        instruments.attach(shared, 1)
        instruments.counter("requests", "Requests.", "status").labels("200").inc()
        instruments.gauge("flying", "In flight.").inc()
        instruments.gauge("readers", "Readers.").inc()

    in_child(count)
    names = {"early": 3.0, "requests\x1f200": 1.0, "flying": 1.0, "readers": 1.0}
    assert shared.sums() == names
    assert shared.living() == 1
    shared.fold(1, LOST)
    assert shared.sums() == {"early": 3.0, "requests\x1f200": 1.0, "errors": 1.0}
    assert shared.living() == 0


def test_a_slot_can_be_used_again_and_the_dead_add_up() -> None:
    shared = SharedPages(1)
    for number in range(1, 101):
        instruments = Instruments()
        instruments.attach(shared, 1)
        instruments.counter("requests", "Requests.").inc()
        assert shared.sums() == {"requests": float(number)}
        shared.fold(1, LOST)
    assert shared.sums() == {"requests": 100.0}


def test_a_reader_in_the_middle_of_a_fold_reads_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SharedPages(1)
    instruments = Instruments()
    instruments.attach(shared, 1)
    instruments.counter("requests", "Requests.").inc(5)
    seen = []
    place = Page.place

    def read_meanwhile(page: Page, name: str, cell: Cell) -> None:
        # the number stands in both pages now, or in none
        place(page, name, cell)
        monkeypatch.setattr("gateway.observe.pages._READ_ATTEMPTS", 1)
        seen.append(shared._count() % 2)

    monkeypatch.setattr(Page, "place", read_meanwhile)
    shared.fold(1, LOST)
    assert seen == [1]
    assert shared._count() == 2
    assert shared.sums() == {"requests": 5.0}


def test_a_full_page_counts_on_without_showing_it() -> None:
    instruments = Instruments()
    odd = instruments.counter("odd", "One series too many, and more.", "label")
    for number in range(PAGE_BYTES // 16):
        odd.labels(str(number)).inc()
    sums = instruments.sums()
    assert 0 < len(sums) < PAGE_BYTES // 16
    assert set(sums.values()) == {1.0}


def test_instruments_become_metric_families() -> None:
    instruments = Instruments()
    instruments.counter("plain", "Plain.")
    instruments.counter("labelled", "Labelled.", "a", "b").labels("x", "y").inc(2)
    instruments.gauge("level", "A level.").inc()
    seconds = instruments.histogram("seconds", "Seconds.", (0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        seconds.observe(value)
    samples = {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in instruments.collect()
        for sample in family.samples
    }
    assert samples == {
        ("plain_total", ()): 0.0,
        ("labelled_total", ("x", "y")): 2.0,
        ("level", ()): 1.0,
        ("seconds_bucket", ("0.1",)): 2.0,
        ("seconds_bucket", ("1.0",)): 3.0,
        ("seconds_bucket", ("+Inf",)): 4.0,
        ("seconds_count", ()): 4.0,
        ("seconds_sum", ()): 7.65,
    }
    assert total(instruments.sums(), "labelled") == total(instruments.sums(), "labelled", "x") == 2
