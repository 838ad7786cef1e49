"""Rows with a uri that may not fit into memory: kept on this disk, in parts by the uri's hash."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from for_ray.storage.refusals import disk_refusals

NUM_PARTS = 256
"""Parts of a set of rows that is too large for one: of 10⁸ rows each has 390,000."""

BUFFER_ROWS = 1 << 17
BUFFER_BYTES = 1 << 26


class Spill:
    """Rows that are written once, as a stream, and then read part by part.

    Equal uris lie in the same part, whatever the store listed first. Few rows stay one part.

    Args:
        folder: An empty or missing folder that belongs to this object; the caller removes it.
        schema: The columns; `uri`, a string, is one of them.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self.num_rows = 0
        self.num_parts = 1
        self._folder = folder
        self._buffer: list[pa.RecordBatch] = []
        self._buffer_rows = 0
        self._buffer_bytes = 0
        self._writers: dict[int, Any] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        """Append rows of the schema."""
        self._buffer.append(batch)
        self.num_rows += batch.num_rows
        self._buffer_rows += batch.num_rows
        self._buffer_bytes += batch.get_total_buffer_size()
        if self._buffer_rows >= BUFFER_ROWS or self._buffer_bytes >= BUFFER_BYTES:
            self.num_parts = NUM_PARTS
            self._flush()

    def finish(self) -> None:
        """Write what is left; call it once, after the last `add`."""
        self._flush()
        with disk_refusals("write", self._folder):
            for writer, file in self._writers.values():
                writer.close()
                file.close()
        self._writers.clear()

    def split(self) -> None:
        """Go from one part to `NUM_PARTS`, to match a larger set; a finished set stays finished."""
        if self.num_parts == 1:
            rows = self.part(0)
            (self._folder / "0.arrow").unlink(missing_ok=True)
            self.num_parts = NUM_PARTS
            self._buffer = rows.combine_chunks().to_batches()
            self.finish()

    def part(self, number: int) -> pa.Table:
        """The rows of one part, 0 <= number < `num_parts`; may be empty."""
        path = self._folder / f"{number}.arrow"
        if not path.exists():
            return self.schema.empty_table()
        with (
            disk_refusals("read", path),
            pa.OSFile(str(path), "rb") as file,
            pa.ipc.open_stream(file) as stream,
        ):
            return stream.read_all()

    def _flush(self) -> None:
        if not self._buffer:
            return
        table = pa.Table.from_batches(self._buffer, self.schema)
        self._buffer, self._buffer_rows, self._buffer_bytes = [], 0, 0
        if self.num_parts == 1:
            self._append(0, table)
            return
        parts = _hashes(table["uri"]) % NUM_PARTS
        order = np.argsort(parts, kind="stable")
        ends = np.cumsum(np.bincount(parts, minlength=NUM_PARTS))
        table = table.take(order)
        for number in range(NUM_PARTS):
            start = ends[number - 1] if number else 0
            if start < ends[number]:
                self._append(number, table.slice(start, ends[number] - start))

    def _append(self, number: int, table: pa.Table) -> None:
        with disk_refusals("write", self._folder):
            if number not in self._writers:
                self._folder.mkdir(parents=True, exist_ok=True)
                file = pa.OSFile(str(self._folder / f"{number}.arrow"), "wb")
                options = pa.ipc.IpcWriteOptions(compression="zstd")
                self._writers[number] = pa.ipc.new_stream(file, self.schema, options=options), file
            self._writers[number][0].write_table(table)


def _hashes(uris: pa.ChunkedArray) -> NDArray[np.uint32]:
    """CRC-32 of each uri: the same in every process, unlike `hash`."""
    each = (zlib.crc32(uri.encode()) for chunk in uris.chunks for uri in chunk.to_pylist())
    return np.fromiter(each, np.uint32, len(uris))
