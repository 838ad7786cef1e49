"""Large JSON files as streams: their lists go through record by record, and are never held whole."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ijson
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from for_ray import storage
from for_ray.errors import DataError
from for_ray.storage import shown

CHUNK_BYTES = 8 << 20
"""Read at once."""

ROWS_A_CHUNK = 1 << 16

Record = dict[str, Any]


def stream_json(uri: str, sinks: Mapping[str, Callable[[Any], None]], *, top: str = "{") -> None:
    """Read a JSON file once, front to back, and hand its values to whom they are for, in the file's order.

    The file is scanned once for each sink, by yajl (50 MB/s); only what a sink asks for becomes objects.

    Args:
        uri: On disk or in a bucket.
        sinks: By ijson's prefix: `images.item` is each member of the list `images`, `item` of a top list.
        top: What the file must be: `{` an object, `[` a list.

    Raises:
        DataError: It is not there, empty, no JSON, or something else at the top.
        StorageError: The store refused.
    """
    parsers = [ijson.items_coro(_Sink(sink), prefix, use_float=True) for prefix, sink in sinks.items()]
    is_first = True
    try:
        for chunk in _chunks(uri):
            if is_first and chunk.strip():
                _require_top(uri, chunk, top)
                is_first = False
            for parser in parsers:
                parser.send(chunk)
        for parser in parsers:
            parser.close()
    except (ijson.JSONError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise DataError(f"{shown(uri)} is not whole JSON: {reason}; fetch or write it again") from error


class _Sink:
    """What ijson sends values to."""

    def __init__(self, take: Callable[[Any], None]) -> None:
        self.send = take


def _chunks(uri: str) -> Iterator[bytes]:
    entry = storage.stat(uri)
    for start in range(0, entry.size_bytes, CHUNK_BYTES):
        length = min(CHUNK_BYTES, entry.size_bytes - start)
        chunk = storage.read_bytes(uri, etag=entry.etag, start=start, length=length)
        yield chunk.removeprefix(b"\xef\xbb\xbf") if start == 0 else chunk


def _require_top(uri: str, chunk: bytes, top: str) -> None:
    first = chunk.lstrip()[:1].decode(errors="replace")
    kinds = {"{": "an object", "[": "a list"}
    if first != top:
        found = kinds.get(first, f"something that starts with {first!r}")
        raise DataError(f"{shown(uri)} holds {found}, expected {kinds[top]}; is it another file?")


class Integers:
    """A column of whole numbers that grows, 8 bytes each."""

    def __init__(self) -> None:
        self._values = array("q")

    def __len__(self) -> int:
        """Its length."""
        return len(self._values)

    def add(self, value: int) -> None:
        """Put one at the end."""
        self._values.append(value)

    def column(self) -> NDArray[np.int64]:
        """All of them."""
        return np.frombuffer(self._values, np.int64) if self._values else np.empty(0, np.int64)


class Strings:
    """A column of strings that grows; only the last few are Python objects."""

    def __init__(self) -> None:
        self._chunks: list[pa.Array] = []
        self._fresh: list[str] = []

    def add(self, value: str) -> None:
        """Put one at the end."""
        self._fresh.append(value)
        if len(self._fresh) == ROWS_A_CHUNK:
            self._flush()

    def column(self) -> pa.ChunkedArray:
        """All of them."""
        self._flush()
        return pa.chunked_array(self._chunks, pa.string())

    def _flush(self) -> None:
        self._chunks.append(pa.array(self._fresh, pa.string()))
        self._fresh = []


def integer(record: Record, key: str, where: str) -> int:
    """A whole number of a record.

    Raises:
        DataError: It is missing, or something else.
    """
    value = record.get(key) if isinstance(record, dict) else None
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        raise DataError(f"{where} needs a whole number as {key!r}, got {str(record)[:80]}")
    return value


def text(record: Record, key: str, where: str) -> str:
    """A string of a record, not empty.

    Raises:
        DataError: It is missing, or something else.
    """
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where} needs a text as {key!r}, got {str(record)[:80]}")
    return value.strip()
