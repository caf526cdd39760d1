"""Numbers that outlive the process that counts them, in memory that a gateway's processes share.

The master creates a :class:`SharedPages` before it forks, and each worker counts in a page of its
own, so counting takes no lock. There are no files: nothing can be cleaned away from under a running
gateway, and nothing is left behind by a killed one. When a worker dies, the master folds its page
into the page of the dead.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from typing import Any

_DOUBLE = struct.Struct("=d")
_LENGTH = struct.Struct("=Q")

#: Bytes of a page: about two thousand series, bounded label values make a few hundred.
PAGE_BYTES = 1 << 18
#: Times that a reader tries to read while the master folds pages, which takes under a millisecond.
_READ_ATTEMPTS = 1000


class Cell:
    """One number of a page. Only the process that owns the page changes it."""

    __slots__ = ("_buffer", "_offset", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._buffer: Any = bytearray(_DOUBLE.size)
        self._offset = 0

    def inc(self, amount: float = 1.0) -> None:
        """Add to the number."""
        self.value += amount
        _DOUBLE.pack_into(self._buffer, self._offset, self.value)

    def dec(self) -> None:
        """Subtract one from the number."""
        self.inc(-1.0)

    def move(self, buffer: Any, offset: int) -> None:
        """Keep the number at another place from now on."""
        self._buffer, self._offset = buffer, offset
        self.inc(0.0)


class Page:
    """Named numbers, one behind the other in a buffer.

    The first eight bytes say how many bytes of complete entries follow. An entry is the length of
    its name, the name, zeros up to a multiple of eight, and the number.
    """

    def __init__(self, buffer: Any = None) -> None:
        self._buffer = memoryview(bytearray(PAGE_BYTES) if buffer is None else buffer)
        self._places: dict[str, int] = {}

    def place(self, name: str, cell: Cell) -> None:
        """Give a number its place. A page that is full leaves it where it is, unshared."""
        offset = self._places.get(name)
        if offset is None:
            offset = self._append(name)
        if offset is not None:
            cell.move(self._buffer, offset)

    def _append(self, name: str) -> int | None:
        key = name.encode()
        used = self._used()
        start = _LENGTH.size + used
        offset = start + _LENGTH.size + -(-len(key) // 8) * 8
        if offset + _DOUBLE.size > len(self._buffer):
            return None
        _LENGTH.pack_into(self._buffer, start, len(key))
        self._buffer[start + _LENGTH.size : start + _LENGTH.size + len(key)] = key
        _DOUBLE.pack_into(self._buffer, offset, 0.0)
        self._places[name] = offset
        # last: a reader sees complete entries only
        _LENGTH.pack_into(self._buffer, 0, offset + _DOUBLE.size - _LENGTH.size)
        return offset

    def __iter__(self) -> Iterator[tuple[str, float]]:
        """Every name with its number."""
        position, end = _LENGTH.size, _LENGTH.size + self._used()
        while position < end:
            (length,) = _LENGTH.unpack_from(self._buffer, position)
            start = position + _LENGTH.size
            offset = start + -(-length // 8) * 8
            (value,) = _DOUBLE.unpack_from(self._buffer, offset)
            yield bytes(self._buffer[start : start + length]).decode(), value
            position = offset + _DOUBLE.size

    def clear(self) -> None:
        """Make the page empty."""
        self._places.clear()
        _LENGTH.pack_into(self._buffer, 0, 0)

    def _used(self) -> int:
        used: int = _LENGTH.unpack_from(self._buffer, 0)[0]
        return used


class SharedPages:
    """The pages of one gateway: one for the dead workers, one for each living worker.

    To be created before the fork. Slots count from 1.
    """

    def __init__(self, slots: int) -> None:
        memory = memoryview(mmap.mmap(-1, PAGE_BYTES * (slots + 1) + mmap.PAGESIZE))
        #: Odd while the master folds a page.
        self._version = memory[: _LENGTH.size]
        begin = mmap.PAGESIZE
        ends = range(begin + PAGE_BYTES, len(memory) + 1, PAGE_BYTES)
        self._pages = [Page(memory[end - PAGE_BYTES : end]) for end in ends]
        #: The numbers of the dead, by name; used in the master only.
        self._dead: dict[str, Cell] = {}

    def page(self, slot: int) -> Page:
        """A worker's own page."""
        return self._pages[slot]

    def fold(self, slot: int, lost: dict[str, str]) -> None:
        """Add a dead worker's numbers to those of the dead and free its slot, in the master.

        ``lost`` maps the names of gauges to what they become: what was in flight has failed. A
        gauge that maps to an empty name ends with its worker.
        """
        self._bump()
        try:
            for name, value in self._pages[slot]:
                name = lost.get(name, name)
                if name:
                    if name not in self._dead:
                        self._dead[name] = Cell()
                        self._pages[0].place(name, self._dead[name])
                    self._dead[name].inc(value)
            self._pages[slot].clear()
        finally:
            self._bump()

    def living(self) -> int:
        """How many workers count now."""
        return sum(1 for page in self._pages[1:] if any(page))

    def sums(self) -> dict[str, float]:
        """Every name with its numbers added up over all workers, dead and alive."""
        for _ in range(_READ_ATTEMPTS):
            before = self._count()
            found = _add_up(self._pages)
            if not before % 2 and before == self._count():
                break
        return found

    def _bump(self) -> None:
        _LENGTH.pack_into(self._version, 0, self._count() + 1)

    def _count(self) -> int:
        count: int = _LENGTH.unpack_from(self._version, 0)[0]
        return count


def _add_up(pages: list[Page]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for page in pages:
        for name, value in page:
            sums[name] = sums.get(name, 0.0) + value
    return sums
