"""A few bytes that all worker processes read without a system call."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path


class SharedFile:
    """A small file that every worker maps into memory as ``view``.

    Writing is a system call, unlike reading: a mapped page that can't reach a full disk would kill
    the process instead of raising OSError.
    """

    def __init__(self, path: Path, size: int) -> None:
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            if error.errno != errno.EROFS or not path.exists():
                raise
            # the disk became read-only while the gateway runs: a new worker can still read
            self._handle = os.open(path, os.O_RDONLY)
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
