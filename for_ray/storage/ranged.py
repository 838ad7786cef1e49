"""A stored file as readers of formats want one: seekable, each read a ranged request bound to its etag."""

from __future__ import annotations

import io

from for_ray.storage.objects import Entry, read_bytes


class RangedReader(io.RawIOBase):
    """A file that is read in parts; a buffer around it makes many small reads one request.

    Args:
        entry: As it was listed, or from `stat`.
    """

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self._entry = entry
        self._position = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Where the next read begins; nothing is asked of the store."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._entry.size_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill the buffer, as far as there is content.

        Raises:
            StorageError: The store refused, or the file is not what was listed.
        """
        length = max(min(len(buffer), self._entry.size_bytes - self._position), 0)
        uri, etag, _ = self._entry
        content = read_bytes(uri, etag=etag, start=self._position, length=length)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
