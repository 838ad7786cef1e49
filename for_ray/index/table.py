"""The table of encoded images, `images.lance`: made, appended to, deleted from, and read by image id.

It is the only checkpoint of an index. Image id = row id, which stays the same through deletes, appends and
compaction; ids grow in the order of the commits and are never given twice.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lance.optimize import Compaction
from numpy.typing import NDArray

from for_ray.errors import DataError
from for_ray.index.commits import commit
from for_ray.index.spread import Spread
from for_ray.schema import Cause, pack_vector_ids
from for_ray.storage import exists, join_uri, lance_options, shown
from for_ray.storage.refusals import lance_refusals

IDS_IN_A_DELETE = 10_000


class ImageVectors(NamedTuple):
    """Vectors of images, one image behind the other.

    Attributes:
        image_ids: int64 [n].
        offsets: int64 [n + 1]; image i has the vectors `offsets[i]` to `offsets[i + 1]`, in slot order.
        vectors: float16 [offsets[-1], D], unit length.
    """

    image_ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    vectors: NDArray[np.float16]

    @property
    def vector_ids(self) -> NDArray[np.int64]:
        """The vector id of each vector, int64 [offsets[-1]]."""
        counts = np.diff(self.offsets)
        slots = np.arange(len(self.vectors)) - np.repeat(self.offsets[:-1], counts)
        return pack_vector_ids(np.repeat(self.image_ids, counts), slots)


def open_table(table_uri: str, *, version: int | None = None) -> Any | None:
    """The table at a version, or at its latest one; None when there is no table yet.

    Raises:
        StorageError: The store refused, or what lies there is no table.
    """
    if not exists(join_uri(table_uri, "_versions")):
        return None
    with lance_refusals(table_uri):
        return lance.dataset(table_uri, version=version, storage_options=lance_options(table_uri))


def require_table(table_uri: str, *, version: int | None = None) -> Any:
    """As `open_table`, where there must be one.

    Raises:
        DataError: There is none.
    """
    table = open_table(table_uri, version=version)
    if table is None:
        raise DataError(f"{table_uri} is not there; run jobs/index.py again")
    return table


def open_version(table: Any, version: int) -> Any | None:
    """Another version of a table that is open; None where the store does not have it any more."""
    name = f"{(1 << 64) - 1 - version}.manifest"  # Lance's own, so that the newest is listed first
    if not exists(join_uri(join_uri(table.uri, "_versions"), name)):
        return None
    return open_table(table.uri, version=version)


def version_of(table: Any | None) -> int:
    """The table's version; 0 where there is no table."""
    return 0 if table is None else int(table.version)


def create_table(table_uri: str, schema: pa.Schema) -> Any:
    """An empty table whose row ids are stable."""

    def create() -> Any:
        return lance.write_dataset(
            schema.empty_table(),
            table_uri,
            mode="create",
            enable_stable_row_ids=True,
            storage_options=lance_options(table_uri),
        )

    with lance_refusals(table_uri):
        return commit(create, find=lambda: open_table(table_uri))


def write_fragments(rows: pa.Table, table_uri: str) -> list[str]:
    """Write rows as files of the table without adding them to it; each fragment as JSON for `append`."""
    with lance_refusals(table_uri):
        fragments = lance.fragment.write_fragments(
            rows, table_uri, schema=rows.schema, mode="append", storage_options=lance_options(table_uri)
        )
    return [json.dumps(fragment.to_json()) for fragment in fragments]


def append(table: Any, fragments: Iterable[str]) -> Any:
    """Add written fragments in one commit; the table after it."""
    added = [lance.FragmentMetadata.from_json(fragment) for fragment in fragments]
    written = {file.path for fragment in added for file in fragment.files}
    latest = table

    def add() -> Any:
        # Without retries of its own: after a try that broke off, a conflict may be that very try.
        return lance.LanceDataset.commit(
            table.uri,
            lance.LanceOperation.Append(added),
            read_version=latest.version,
            storage_options=lance_options(table.uri),
            max_retries=20 if latest is table else 0,
        )

    def find() -> Any | None:
        nonlocal latest
        latest = lance.dataset(table.uri, storage_options=lance_options(table.uri))
        files = (file.path for part in latest.get_fragments() for file in part.metadata.files)
        return latest if not written.isdisjoint(files) else None

    with lance_refusals(table.uri):
        return commit(add, find=find)


def delete_images(table: Any, image_ids: NDArray[np.int64]) -> None:
    """Take rows out of the table's latest version; ids that it does not hold are passed over."""
    for start in range(0, len(image_ids), IDS_IN_A_DELETE):
        ids = ", ".join(map(str, image_ids[start : start + IDS_IN_A_DELETE].tolist()))
        delete_rows(table, f"_rowid in ({ids})")


def delete_rows(table: Any, predicate: str) -> None:
    """Take the rows that a predicate names out of the table's latest version."""
    with lance_refusals(table.uri):
        # A delete that is in already finds nothing to do.
        commit(lambda: table.delete(predicate) or True, find=table.checkout_latest)


def add_missing_columns(table: Any, schema: pa.Schema) -> None:
    """Give the table the metadata columns of a manifest that it does not have yet; old rows get nulls."""
    known = set(table.schema.names)
    added = [field.with_nullable(True) for field in schema if field.name not in known]
    if added:

        def find() -> bool | None:
            table.checkout_latest()
            return not {field.name for field in added}.difference(table.schema.names) or None

        with lance_refusals(table.uri):
            commit(lambda: table.add_columns(pa.schema(added)) or True, find=find)


def scan_state(table: Any, *, since: Any | None = None) -> Iterator[pa.RecordBatch]:
    """What a diff has to know of every row: `uri`, `etag`, `error`, `_rowid` (uint64).

    Args:
        table: The table.
        since: An earlier version of it: only rows that were appended behind it.
    """
    held = set() if since is None else {part.fragment_id for part in since.get_fragments()}
    fragments = [part for part in table.get_fragments() if part.fragment_id not in held]
    if fragments:
        yield from _scan(table, ["uri", "etag", "error"], with_row_id=True, fragments=fragments)


def scan_labels(table: Any) -> Iterator[pa.RecordBatch]:
    """What was labelled: `uri`, `etag`, `labels`, `probabilities` of all rows without an error."""
    yield from _scan(table, ["uri", "etag", "labels", "probabilities"], filter="error IS NULL")


def count_images(table: Any) -> tuple[int, int]:
    """Rows that are indexed, and rows that are quarantined."""
    with lance_refusals(table.uri):
        num_quarantined = table.count_rows("error IS NOT NULL")
        return table.count_rows() - num_quarantined, num_quarantined


def worst_causes(table: Any, *, limit: int | None = None, num_examples: int = 3) -> list[Cause]:
    """The commonest reasons of quarantine, worst first; equally common ones in the order of their names.

    A reason counts up to its first colon or parenthesis, so that sizes and offsets do not split it, and
    without the image's own uri, where it begins with that.

    Args:
        table: The table.
        limit: How many reasons; all where None.
        num_examples: How many uris of each, at most: the first ones of the table.
    """
    counts: Counter[str] = Counter()
    examples: defaultdict[str, list[str]] = defaultdict(list)
    for uri, error in scan_quarantined(table):
        cause = _cause(uri, error)
        counts[cause] += 1
        if len(examples[cause]) < num_examples:
            examples[cause].append(uri)
    worst = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]
    return [Cause(cause=cause, count=count, examples=tuple(examples[cause])) for cause, count in worst]


def _cause(uri: str, error: str) -> str:
    for whose in (uri, uri.rpartition("#")[0]):  # an image's, or its tar's
        if whose and error.startswith(f"{shown(whose)} "):
            error = error.removeprefix(f"{shown(whose)} ")
            break
    return re.split(r"[:(]", error, maxsplit=1)[0].strip() or error


def scan_quarantined(table: Any) -> Iterator[tuple[str, str]]:
    """Uri and reason of each quarantined image."""
    for batch in _scan(table, ["uri", "error"], filter="error IS NOT NULL"):
        yield from zip(batch["uri"].to_pylist(), batch["error"].to_pylist(), strict=True)


FEW_FRAGMENTS = 32
"""Small files are left alone until there are more of them than these: one that grows a little every night
would be written anew every night."""

COMPACT_BYTES = 16 << 30
"""What one compaction reads at most: it runs on the driver; the next night goes on."""


def compact(table: Any, *, rows: int, check: Callable[[], None]) -> Any:
    """Write small files of the table as fewer ones, and files with many deleted rows without these.

    Row ids stay. What a year of nights leaves behind would make every scan open thousands of files. Memory: a
    batch of rows; older versions keep their files until they are swept.

    Args:
        table: At its latest version; nobody else writes to it.
        rows: A file with fewer is small, and what comes of small ones has about so many.
        check: Called before each file that is written, and before the commit; what it raises ends the
            compaction, and the table is as it was.

    Returns:
        The table after it; the same one where there was little to do.
    """
    fragments = table.get_fragments()
    num_small = sum(fragment.metadata.physical_rows < rows for fragment in fragments)
    num_holed = sum(10 * fragment.num_deletions > fragment.metadata.physical_rows for fragment in fragments)
    if num_small <= FEW_FRAGMENTS and not num_holed:
        return table

    options = {
        "target_rows_per_fragment": rows,
        "materialize_deletions": True,
        "materialize_deletions_threshold": 0.1,
        "max_source_bytes": COMPACT_BYTES,
        "num_threads": 1,
    }
    with lance_refusals(table.uri):
        tasks = Compaction.plan(table, options).tasks
        rewrites = []
        for task in tasks:
            check()
            rewrites.append(commit(functools.partial(task.execute, table), find=lambda: None))
        if rewrites:
            check()
            _commit_rewrites(table, tasks, rewrites)
    return open_table(table.uri)


def _commit_rewrites(table: Any, tasks: Sequence[Any], rewrites: list[Any]) -> None:
    replaced = {fragment.id for task in tasks for fragment in task.fragments}

    def find() -> bool | None:
        table.checkout_latest()
        return replaced.isdisjoint(fragment.fragment_id for fragment in table.get_fragments()) or None

    commit(lambda: bool(Compaction.commit(table, rewrites)) or True, find=find)


def sweep_versions(table_uri: str, kept: Iterable[int]) -> None:
    """Remove the versions of the table that nobody needs, with the files that only these refer to.

    Kept are the latest version and those in `kept`, which get a tag unless they are lost; tags of others go.
    Files that no version refers to, as a killed task leaves them, go when they are a week old: until then
    they might be of a commit to come.
    """
    table = require_table(table_uri)
    with lance_refusals(table_uri):
        there = {each["version"] for each in table.versions()}
        tagged, wanted = (
            set(table.tags.list()),
            {f"v{version}": version for version in there.intersection(kept)},
        )
        for name in wanted.keys() - tagged:
            table.tags.create(name, wanted[name])
        for name in tagged - wanted.keys():
            table.tags.delete(name)
        table.cleanup_old_versions(older_than=datetime.timedelta(0), error_if_tagged_old_versions=False)


def count_held(table: Any, first: int, end: int | None = None) -> Spread:
    """Count the images with `first` <= id < `end`, by their boxes: fewer bytes than their vectors.

    All from `first` on where there is no end.
    """
    held = Spread(first)
    predicate = f"_rowid >= {first}" + ("" if end is None else f" AND _rowid < {end}")
    for batch in _scan(table, ["boxes"], with_row_id=True, filter=predicate):
        counts = pc.fill_null(pc.list_value_length(batch["boxes"]), 0)
        held.add(batch["_rowid"].to_numpy().astype(np.int64), counts.to_numpy().astype(np.int64))
    return held


def read_vectors(table: Any, first: int, end: int, *, batch_rows: int) -> Iterator[ImageVectors]:
    """The vectors of the images with `first` <= id < `end`, in batches; quarantined images have none."""
    predicate = f"_rowid >= {first} AND _rowid < {end}"
    for batch in _scan(table, ["vectors"], with_row_id=True, filter=predicate, batch_size=batch_rows):
        yield unpack_vectors(batch["_rowid"], batch["vectors"])


def take_vectors(table: Any, image_ids: Sequence[int] | NDArray[np.int64]) -> ImageVectors:
    """The vectors of these images, in the order given; ids that the table does not hold are left out."""
    ids = np.asarray(image_ids, np.int64)
    if not len(ids):
        dim = table.schema.field("vectors").type.value_type.list_size
        return ImageVectors(ids, np.zeros(1, np.int64), np.empty((0, dim), np.float16))
    rows = _take(table, ids, ["vectors", "_rowid"])
    return unpack_vectors(rows["_rowid"], rows["vectors"])


def take_rows(table: Any, row_ids: NDArray[np.int64], columns: list[str]) -> pa.Table:
    """These columns of these rows, in the order given; ids that the table does not hold are left out."""
    return _take(table, row_ids, columns)


def unpack_vectors(row_ids: pa.Array | pa.ChunkedArray, column: pa.Array | pa.ChunkedArray) -> ImageVectors:
    """The columns `_rowid` and `vectors` as numpy, without a copy where they are in one piece."""
    if isinstance(column, pa.ChunkedArray):
        column, row_ids = column.combine_chunks(), row_ids.combine_chunks()
    counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    values = column.flatten()
    vectors = values.flatten().to_numpy(zero_copy_only=False).reshape(-1, values.type.list_size)
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return ImageVectors(row_ids.to_numpy().astype(np.int64), offsets, vectors)


def _scan(table: Any, columns: list[str], **options: Any) -> Iterator[pa.RecordBatch]:
    with lance_refusals(table.uri):
        yield from table.scanner(columns=columns, **options).to_batches()


def _take(table: Any, image_ids: NDArray[np.int64], columns: list[str]) -> pa.Table:
    with lance_refusals(table.uri):
        return table._take_rows(image_ids.tolist(), columns=columns)
