"""A few bytes that all worker processes read without a system call."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path

#: The mode of the state's files.
PRIVATE = 0o600


class SharedFile:
    """A small file that every worker maps into memory as ``view``.

    Writing is a system call, unlike reading: a mapped page that can't reach a full disk would kill
    the process instead of raising OSError.
    """

    def __init__(self, path: Path, size: int) -> None:
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE)
        except OSError as error:
            if error.errno != errno.EROFS or not path.exists():
                raise
            # the disk became read-only while the gateway runs: a new worker can still read
            self._handle = os.open(path, os.O_RDONLY)
        make_private(path)
        try:
            if os.fstat(self._handle).st_size < size:
                os.pwrite(self._handle, b"\0", size - 1)
            self.view = mmap.mmap(self._handle, size, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(self._handle)
            raise

    def write(self, offset: int, data: bytes) -> None:
        """Write ``data`` at ``offset``. Raises OSError."""
        os.pwrite(self._handle, data, offset)

    def close(self) -> None:
        self.view.close()
        os.close(self._handle)


def make_private(path: Path) -> None:
    """Give an existing file the mode :data:`PRIVATE`.

    A file that belongs to another user, or is on a read-only disk, stays as it is.
    """
    if os.name != "posix":
        return
    with suppress(OSError):
        if stat.S_IMODE(os.stat(path).st_mode) != PRIVATE:
            os.chmod(path, PRIVATE)
