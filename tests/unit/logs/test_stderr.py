"""Nobody has to read standard error: what does not fit is dropped and counted."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from gateway.logs import stderr
from gateway.logs.stderr import Queue


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)


def read_all(reading: int) -> tuple[threading.Thread, list[bytes]]:
    pieces: list[bytes] = []

    def read() -> None:
        while piece := os.read(reading, 65536):
            pieces.append(piece)

    thread = threading.Thread(target=read)
    thread.start()
    return thread, pieces


@pytest.mark.parametrize("text", ["x" * 99 + "\n", "y" * 9999 + "\n"])
def test_a_pipe_that_nobody_reads_blocks_nobody(pipe: tuple[int, int], text: str) -> None:
    reading, writing = pipe
    queue = Queue(writing)
    count = 3 * max(stderr.MAX_TEXTS, stderr.MAX_BYTES // 9999)
    for _ in range(count):
        queue.put(text)
    assert not queue.flush(0.01)
    thread, pieces = read_all(reading)
    assert queue.flush(10)
    queue.put("after\n")
    assert queue.flush(10)
    os.close(writing)
    thread.join(10)
    lines = b"".join(pieces).decode().splitlines()
    written = lines.count(text.strip())
    dropped = [int(line.split()[1]) for line in lines if "log lines were dropped" in line]
    assert written + sum(dropped) == count
    assert written < count * 2 / 3 + 1
    assert lines[-1] == "after"
    # one full queue that the writer has taken, and another that waits for it
    assert sum(map(len, lines)) <= 2 * stderr.MAX_BYTES + 1000


def test_a_closed_pipe_loses_lines_and_nothing_else() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    queue = Queue(writing)
    queue.put("nobody\n")
    assert queue.flush(10)
    os.close(writing)
