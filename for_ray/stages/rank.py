"""Rank: a published index and names → the first images of each name, by the index and by exact search.

Only images that the data set has, too, are ranked: the others are passed over in both ways of search alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from for_ray.evaluation.exact import Batch, exact_top_images
from for_ray.index.search import open_segments, search_images
from for_ray.index.table import ImageVectors, read_vectors, scan_state, take_vectors
from for_ray.schema import Snapshot
from for_ray.stages.cluster import Cluster
from for_ray.stages.ranges import RangeJob, split_ids

IMAGES_A_TASK, IMAGES_A_READ = 50_000, 512
"""Images that one task compares with all queries, and how many of them it holds at once."""


class Members(NamedTuple):
    """The images that an index and a data set share.

    Attributes:
        image_ids: Of the shared ones that have vectors [M], ascending.
        rows: Their places in the data set [M].
        strangers: Ids of the images that the data set has not, ascending.
    """

    image_ids: NDArray[np.int64]
    rows: NDArray[np.int64]
    strangers: NDArray[np.int64]


def find_members(table: Any, uris: pa.ChunkedArray) -> Members:
    """Compare the uris of an index with those of a data set [B].

    Args:
        table: The table of images, at the snapshot's version.
        uris: Of the data set.
    """
    row_of = {uri: row for row, uri in enumerate(uris.to_pylist())}
    found: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = [
        (np.empty(0, np.int64), np.empty(0, np.int64))
    ]
    for batch in scan_state(table):
        is_indexed = ~np.asarray(batch["error"].is_valid())
        rows = np.array([row_of.get(uri, -1) for uri in batch["uri"].to_pylist()], np.int64)
        found.append((batch["_rowid"].to_numpy().astype(np.int64)[is_indexed], rows[is_indexed]))
    image_ids, rows = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(image_ids)
    image_ids, rows = image_ids[order], rows[order]
    is_shared = rows >= 0
    return Members(image_ids[is_shared], rows[is_shared], image_ids[~is_shared])


def rank_by_index(
    job: RangeJob,
    snapshot: Snapshot,
    queries: NDArray[np.float32],
    members: Members,
    *,
    depth: int,
    cache_path: Path,
    on_progress: Callable[[int], None],
) -> list[NDArray[np.int64]]:
    """What a search of the index answers, in this process.

    The other images' vectors are passed over, but no more lists are looked at for them than the snapshot
    says: what these lists lack is the index's loss. A query may thus have fewer images than `depth`.

    Args:
        job: Names the table and its version.
        snapshot: Names the segments, and the lists that a search looks at.
        queries: [Q, D], unit length.
        members: The images that may be found.
        depth: How many.
        cache_path: For segments of a bucket; the caller removes it.
        on_progress: Called with the number of queries that were answered.
    """
    table = job.open_table()

    def stored(image_ids: NDArray[np.int64]) -> ImageVectors:
        return take_vectors(table, image_ids)

    segments = open_segments(
        job.layout, job.fingerprint, snapshot.segments, nprobe=snapshot.nprobe, cache_path=cache_path
    )
    excluded = np.union1d(members.strangers, np.asarray(snapshot.deleted_image_ids, np.int64))
    found = []
    for query in queries:
        ranked = search_images(
            segments, query, depth, exact=stored, exclude_image_ids=excluded, probes_more=False
        )
        found.append(ranked.image_ids)
        on_progress(len(found))
    return found


def rank_exactly(
    cluster: Cluster, job: RangeJob, queries: NDArray[np.float32], members: Members, *, depth: int
) -> list[NDArray[np.int64]]:
    """What a comparison with every stored vector of the members answers, by Ray tasks.

    Args:
        cluster: Where the tasks run.
        job: Names the table and its version.
        queries: [Q, D], unit length.
        members: The images that may be found.
        depth: How many.
    """
    _ = cluster.resources
    task = ray.remote(_rank_range).options(num_cpus=1, max_retries=3)
    shared, ids = ray.put(queries), ray.put(members.image_ids)
    num_images = len(members.image_ids)
    first, end = (int(members.image_ids[0]), int(members.image_ids[-1]) + 1) if num_images else (0, 0)
    ranges = split_ids(first, end, most=IMAGES_A_TASK)
    parts = ray.get([task.remote(job, *edges, shared, ids, depth) for edges in ranges])
    if not parts:
        return [np.empty(0, np.int64) for _ in queries]
    image_ids, scores = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
    order = np.lexsort((image_ids, -scores), axis=1)[:, :depth]
    return list(np.take_along_axis(image_ids, order, axis=1))


def _rank_range(
    job: RangeJob, first: int, end: int, queries: NDArray[np.float32], members: NDArray[np.int64], depth: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    batches = read_vectors(job.open_table(), first, end, batch_rows=IMAGES_A_READ)
    return exact_top_images(_only(batches, members), queries, depth)


def _only(batches: Iterator[ImageVectors], members: NDArray[np.int64]) -> Iterator[Batch]:
    """The batches without the images that are no members."""
    for image_ids, offsets, vectors in batches:
        is_member = np.isin(image_ids, members)
        counts = np.diff(offsets)
        kept = np.concatenate([[0], np.cumsum(counts[is_member])])
        yield image_ids[is_member], kept, vectors[np.repeat(is_member, counts)]


def as_columns(
    rankings: Sequence[NDArray[np.int64]], members: Members, rank_of_row: NDArray[np.int64], depth: int
) -> NDArray[np.int64]:
    """Rankings by image id as rankings by column, for `summarise_rankings`.

    Args:
        rankings: Ids of members, of each query at most `depth`.
        members: The images that were ranked.
        rank_of_row: The column of each of the data set's images [B].
        depth: R.

    Returns:
        [Q, R]; -1 where a query has no more.
    """
    columns = np.full((len(rankings), depth), -1, np.int64)
    for query, ids in enumerate(rankings):
        columns[query, : len(ids)] = rank_of_row[members.rows[np.searchsorted(members.image_ids, ids)]]
    return columns
