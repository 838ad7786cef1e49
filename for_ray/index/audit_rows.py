"""What the rows of a published snapshot's table hold, and what is wrong with them in themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from for_ray.index.faults import Fault, Faults
from for_ray.index.segment import CHUNK_VECTORS, LENGTH_TOLERANCE
from for_ray.index.table import unpack_vectors
from for_ray.schema import image_ids_of, slots_of
from for_ray.storage import Spill, shown
from for_ray.storage.refusals import lance_refusals

IMAGES_A_READ = 512
"""Images whose vectors are in memory at once."""

_KINDS = {"uri": pa.string(), "etag": pa.string(), "is_quarantined": pa.bool_()}


@dataclass
class Rows:
    """The rows of a range of image ids: `counts[i]` vectors of the image `image_ids[i]`, ascending.

    Attributes:
        all_ids: Of all images of the range, of those in files that cannot be read too; ascending.
    """

    all_ids: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    counts: NDArray[np.int64]
    num_indexed: int = 0
    num_quarantined: int = 0
    faults: Faults = field(default_factory=Faults)

    @property
    def num_vectors(self) -> int:
        """Of all images that could be read."""
        return int(self.counts.sum())

    @property
    def num_unread(self) -> int:
        """Images in files that cannot be read."""
        return len(self.all_ids) - len(self.image_ids)


def read_rows(table: Any, first: int, end: int, *, broken: frozenset[int]) -> Rows:
    """Check the images with `first` <= id < `end`: each has an error, or else sound vectors with a box each.

    Args:
        table: At the snapshot's version.
        first: The first id.
        end: Behind the last id.
        broken: Fragments of the table that cannot be read.

    Raises:
        StorageError: Rows cannot be read.
    """
    rows = Rows(read_ids(table, first, end), np.empty(0, np.int64), np.empty(0, np.int64))
    parts = [(rows.image_ids, rows.counts)]
    options = {"with_row_id": True, "filter": _between(first, end), "batch_size": IMAGES_A_READ}
    batches = _scan(table, ["uri", "error", "vectors", "boxes"], broken=broken, **options)
    parts += [_check_batch(batch, rows) for batch in batches]
    image_ids, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(image_ids)
    rows.image_ids, rows.counts = image_ids[order], counts[order]
    return rows


def read_ids(table: Any, first: int, end: int) -> NDArray[np.int64]:
    """The image ids in a range, ascending; they are known even where the files of their rows are gone.

    Raises:
        StorageError: A list of deleted rows cannot be read.
    """
    return np.sort(np.concatenate([np.empty(0, np.int64), *_scan_ids(table, filter=_between(first, end))]))


def end_of_ids(table: Any) -> int:
    """Behind the last image id; 0 where there are no images.

    Raises:
        StorageError: A list of deleted rows cannot be read.
    """
    return max((int(ids.max()) + 1 for ids in _scan_ids(table)), default=0)


def find_doubled(table: Any, folder: Path, *, keys: Sequence[str], broken: frozenset[int]) -> Fault | None:
    """Rows that are the same in some columns, part by part on this disk, so that memory stays flat.

    Args:
        table: At some version.
        folder: For what is compared; the caller removes it.
        keys: `uri`, then any of `etag` and `is_quarantined`.
        broken: Fragments of the table that cannot be read.

    Returns:
        How many are there more than once, and the uri of one of them; None: none.

    Raises:
        StorageError: Rows cannot be read, or the disk refused.
    """
    rows = Spill(folder, pa.schema([(name, _KINDS[name]) for name in keys]))
    for batch in _scan(table, ["uri", "etag", "error"], broken=broken):
        columns = {"uri": batch["uri"], "etag": batch["etag"], "is_quarantined": pc.is_valid(batch["error"])}
        rows.add(pa.record_batch([columns[name] for name in keys], schema=rows.schema))
    rows.finish()
    num_doubled, example = 0, ""
    for number in range(rows.num_parts):
        counts = rows.part(number).group_by(list(keys)).aggregate([([], "count_all")])
        doubled = counts.filter(pc.greater(counts["count_all"], 1))
        if doubled.num_rows:
            num_doubled += doubled.num_rows
            example = example or shown(doubled["uri"][0].as_py())
    return Fault(num_doubled, example) if num_doubled else None


def name_of(vector_id: np.int64) -> str:
    """What to call a vector in a message."""
    one = np.asarray(vector_id)
    return f"image {int(image_ids_of(one))}, slot {int(slots_of(one))}"


def _between(first: int, end: int) -> str:
    return f"_rowid >= {first} AND _rowid < {end}"


def _scan_ids(table: Any, **options: Any) -> Iterator[NDArray[np.int64]]:
    for batch in _scan(table, [], broken=frozenset(), with_row_id=True, **options):
        if batch.num_rows:
            yield batch["_rowid"].to_numpy().astype(np.int64)


def _scan(table: Any, columns: list[str], *, broken: frozenset[int], **options: Any) -> Iterator[Any]:
    """Batches of the rows of all fragments but the broken ones."""
    if broken:
        whole = [each for each in table.get_fragments() if each.fragment_id not in broken]
        if not whole:
            return
        options["fragments"] = whole
    with lance_refusals(table.uri):
        yield from table.scanner(columns=columns, **options).to_batches()


def _check_batch(batch: pa.RecordBatch, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Check some rows, and count them; their image ids, and how many vectors each has."""
    held = unpack_vectors(batch["_rowid"], batch["vectors"])
    counts = np.diff(held.offsets)
    boxes = pc.fill_null(pc.list_value_length(batch["boxes"]), 0).to_numpy(zero_copy_only=False)
    has_error = pc.is_valid(batch["error"]).to_numpy(zero_copy_only=False)

    def tell(kind: str, is_bad: NDArray[np.bool_]) -> None:
        bad = np.flatnonzero(is_bad)
        if len(bad):
            uri = shown(batch["uri"][int(bad[0])].as_py())
            rows.faults.add(kind, len(bad), f"image {held.image_ids[bad[0]]}, {uri}")

    tell("both", has_error & (counts > 0))
    tell("neither", ~has_error & (counts == 0))
    tell("boxes", boxes != counts)
    bad = _find_bad(held.vectors)
    if len(bad):
        rows.faults.add("values", len(bad), name_of(held.vector_ids[bad[0]]))
    rows.num_indexed += int(np.count_nonzero(~has_error))
    rows.num_quarantined += int(np.count_nonzero(has_error))
    return held.image_ids, counts.astype(np.int64)


def _find_bad(vectors: NDArray[np.float16]) -> NDArray[np.int64]:
    """Positions of vectors that are not of length 1, or have NaN."""
    bad = [np.empty(0, np.int64)]
    for start in range(0, len(vectors), CHUNK_VECTORS):
        chunk = vectors[start : start + CHUNK_VECTORS].astype(np.float32)
        length = np.sqrt(np.einsum("nd,nd->n", chunk, chunk))
        bad.append(start + np.flatnonzero(~(np.abs(length - 1.0) <= LENGTH_TOLERANCE)))
    return np.concatenate(bad)
