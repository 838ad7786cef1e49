"""Verify: what is about to be published is whole, and finds what exact search finds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray

from for_ray.errors import StageError
from for_ray.evaluation.exact import exact_top_images, recall_at_k
from for_ray.index.search import num_candidates, open_segments, search_images
from for_ray.index.table import ImageVectors, read_vectors, take_vectors, worst_causes
from for_ray.schema import Cause, Codec, Segment
from for_ray.stages.cluster import Cluster
from for_ray.stages.ranges import RangeJob, split_ids
from for_ray.storage import shown

RANKED = 50
"""Recall is that of the first 50 images: what a page of results shows."""

SAMPLED_VECTORS = 4_000_000
"""Recall is measured over so many vectors, of images all over each segment drawn; over all of a smaller
index."""

IMAGES_OF_A_PIECE, LEAST_PIECES = 16, 8
"""Images of a segment that are drawn side by side, at most, and how many such pieces it has at least. Images
that follow each other are often alike, as frames of a video are: of each kind the same share must be drawn.
Single ones would cost a read each."""

LEAST_RANKED = 10
"""Of a sample as many images are compared as of the first 50 lie in it: a tenth of the images holds five. At
least so many, for fewer are no measure: of an index of more than 20 million vectors these are images behind
the 50th, which more lists have to be looked at for, so that its recall is rather higher than what is said."""

WORST_CAUSES = 5
"""Reasons of quarantine that the message of a refused run names."""

DENIED_CAUSE = (
    "could not be read, nor any beside them: check the rights to read objects, the keys that they are "
    "encrypted with, and AWS_ENDPOINT_URL"
)

IMAGES_A_TASK, IMAGES_A_READ = 50_000, 512
"""Images that one task compares with all queries, and how many of them it holds at once."""


LEAST_GAIN = 0.002
"""Where twice the lists gain less recall than this, it is the codec that holds it back."""


NUM_EXAMPLES, IDS_AN_EXAMPLE = 64, 4
"""Vectors of the index's own images that recall is measured with, too: texts lie apart from what images hold,
and find their lists in another way. Ids looked up for each, since some are holes or have no vectors."""


class Recall(NamedTuple):
    """The share of exact search's first 50 images that `nprobe` lists have, and what was asked for.

    None where there is nothing to find, or nothing of it in the sample.
    """

    recall: float | None
    nprobe: int
    target: float | None = None


def measure_recall(
    cluster: Cluster,
    job: RangeJob,
    segments: Sequence[Segment],
    queries: NDArray[np.float32],
    *,
    deleted: NDArray[np.int64],
    nprobe: int,
    target: float,
    cache_path: Path,
) -> Recall:
    """Double `nprobe` until the search finds what exact search finds, or more lists find no more.

    Both answer over the same sample of the images. The n-th best image of a share s of them is about the
    n/s-th of all, and finding it takes as many lists: therefore 50·s images are compared.

    Recall is that of the texts, or that of vectors of the index's own images, whichever is less; an image is
    not counted among what its own vector finds.

    Args:
        cluster: Where the tasks run.
        job: Names the table and its version.
        segments: All of the index; at least one.
        queries: Of texts, [Q, D], unit length.
        deleted: Image ids that the segments still have and the table has not; ascending.
        nprobe: Where to begin.
        target: The recall that is enough.
        cache_path: For segments of a bucket; the caller removes it.
    """
    sample = _draw_sample(segments)
    _ = cluster.resources
    table = job.open_table()
    examples, owners = _draw_examples(table, sample.segments)
    asked = np.concatenate([queries, examples])
    owners = np.concatenate([np.full(len(queries), -1), owners])
    exact = _exact(job, sample.ranges, asked)
    share = exact.num_vectors / max(1, sum(segment.num_live for segment in segments))
    depth = min(RANKED, max(LEAST_RANKED, round(RANKED * share)))
    right = _but_owners(exact.image_ids, owners, depth)
    if not any(map(len, right)):
        return Recall(None, nprobe, target)
    index = open_segments(job.layout, job.fingerprint, sample.segments, nprobe=nprobe, cache_path=cache_path)

    def stored(image_ids: NDArray[np.int64]) -> ImageVectors:
        return take_vectors(table, image_ids)

    def find(query: NDArray[np.float32]) -> NDArray[np.int64]:
        return search_images(
            index,
            query,
            depth + 1,
            exact=stored,
            exclude_image_ids=deleted,
            only_image_ids=sample.image_ids,
            nprobe=nprobe,
            probes_more=False,  # of so many lists alone: twice as many must be able to find more
            candidates=num_candidates(RANKED + 1) * (depth + 1) // (RANKED + 1),
        ).image_ids

    before = -1.0
    while True:
        found = _but_owners(list(map(find, asked)), owners, depth)
        texts, rest = slice(len(queries)), slice(len(queries), None)
        recall = min(
            recall_at_k(found[part], right[part]) for part in (texts, rest) if any(map(len, right[part]))
        )
        if recall >= target or nprobe >= index.nlist or recall - before < LEAST_GAIN:
            return Recall(recall, min(nprobe, index.nlist), target)
        before, nprobe = recall, 2 * nprobe


def check_readable(
    images: Any, *, num_quarantined: int, num_skipped: int, num_denied: int, num_listed: int, most: float
) -> None:
    """Raise when more than this share of the listed images could not be read.

    Args:
        images: The table, for the reasons of those in quarantine.
        num_quarantined: Listed images that are quarantined.
        num_skipped: Those that were not there, or not as listed, when they were to be read, or denied: a
            manifest that is wrong as a whole must not empty an index.
        num_denied: Those of them that could not be read, nor any beside them.
        num_listed: All of them.
        most: The share.

    Raises:
        StageError: With the commonest reasons, and an image for each.
    """
    num_bad = num_quarantined + num_skipped
    if num_bad <= most * num_listed:
        return
    skipped = {"not there, or not as listed": num_skipped - num_denied, DENIED_CAUSE: num_denied}
    found = [Cause(cause=cause, count=count) for cause, count in skipped.items() if count]
    found += worst_causes(images, limit=WORST_CAUSES, num_examples=1)
    causes = "; ".join(
        f"{each.count:,} × {each.cause}" + "".join(f" ({shown(uri)})" for uri in each.examples)
        for each in found
    )
    raise StageError(
        "encode",
        f"{num_bad:,} of {num_listed:,} images are unreadable ({num_bad / num_listed:.1%}), "
        f"more than max_bad_fraction {most:g}; nothing was published: mend them or raise it. Worst: {causes}",
    )


def check_closed(*, num_missing: int, num_skipped: int, num_stale: int) -> None:
    """Raise unless every listed image is in the table once, as it was listed, and nothing else is.

    Args:
        num_missing: New and changed images of a diff of the same listing against the final table.
        num_skipped: Images that were deleted or replaced between the listing and the reading, or denied.
        num_stale: Rows of no listed image, and second rows of one.

    Raises:
        StageError: The numbers don't add up.
    """
    if num_missing != num_skipped or num_stale:
        raise StageError(
            "verify",
            f"{num_missing} listed images are not in the table as they were listed, expected {num_skipped}; "
            f"{num_stale} of its rows are of no listed image, expected 0; not published: run again",
        )


class _Sample(NamedTuple):
    """What recall is measured over: segments, ranges of their image ids, and these ids; None for all."""

    segments: list[Segment]
    ranges: list[tuple[int, int]]
    image_ids: NDArray[np.int64] | None


def _draw_sample(segments: Sequence[Segment]) -> _Sample:
    """Segments in a random order until there are enough vectors, and of each the same share of its ids."""
    drawn: list[Segment] = []
    for position in np.random.default_rng(len(segments)).permutation(len(segments)):
        if sum(segment.num_vectors for segment in drawn) >= SAMPLED_VECTORS:
            break
        drawn.append(segments[position])
    share = SAMPLED_VECTORS / max(1, sum(segment.num_vectors for segment in drawn))
    if share >= 1:
        return _Sample(drawn, [(segment.first_image_id, segment.end_image_id) for segment in drawn], None)
    ranges = [
        (low, low + max(1, round(share * (end - low))))
        for segment in drawn
        for low, end in _stretches(segment, int(IMAGES_OF_A_PIECE / share))
    ]
    return _Sample(drawn, ranges, np.sort(np.concatenate([np.arange(*edges) for edges in ranges])))


def _stretches(segment: Segment, most: int) -> list[tuple[int, int]]:
    """The segment's image ids in stretches of at most so many, of each of which a piece is drawn."""
    first, end = segment.first_image_id, segment.end_image_id
    return split_ids(first, end, most=min(most, -(-(end - first) // LEAST_PIECES)))


def _draw_examples(table: Any, segments: Sequence[Segment]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Vectors [n, D] of images all over the segments, n at most `NUM_EXAMPLES`, and whose they are [n]."""
    count = IDS_AN_EXAMPLE * NUM_EXAMPLES // len(segments) + 1
    spans = [(segment.first_image_id, segment.end_image_id - 1) for segment in segments]
    ids = np.unique(np.concatenate([np.linspace(*span, count).astype(np.int64) for span in spans]))
    drawn = take_vectors(table, ids)
    num_slots = np.diff(drawn.offsets)
    held = np.flatnonzero(num_slots)
    chosen = held[np.unique(np.linspace(0, len(held) - 1, min(len(held), NUM_EXAMPLES)).astype(np.int64))]
    slots = np.arange(len(chosen)) % num_slots[chosen]
    return drawn.vectors[drawn.offsets[chosen] + slots].astype(np.float32), drawn.image_ids[chosen]


def _but_owners(
    ranked: Sequence[NDArray[np.int64]], owners: NDArray[np.int64], depth: int
) -> list[NDArray[np.int64]]:
    """The first images of each query without the one that it was drawn of."""
    return [ids[ids != owner][:depth] for ids, owner in zip(ranked, owners, strict=True)]


class _Exact(NamedTuple):
    """The first images of each query, best first, and how many vectors it was compared with."""

    image_ids: list[NDArray[np.int64]]
    num_vectors: int


def _exact(job: RangeJob, ranges: Sequence[tuple[int, int]], queries: NDArray[np.float32]) -> _Exact:
    """The right answers: every task ranks ranges of image ids, the driver ranks the best."""
    task = ray.remote(_exact_of_ranges).options(num_cpus=1, max_retries=3)
    shared = ray.put(queries)
    parts = ray.get([task.remote(job, some, shared) for some in _share_out(ranges)])
    ids = np.concatenate([part[0] for part in parts], axis=1)
    scores = np.concatenate([part[1] for part in parts], axis=1)
    order = np.lexsort((ids, -scores), axis=1)[:, : RANKED + 1]
    return _Exact(list(np.take_along_axis(ids, order, axis=1)), sum(part[2] for part in parts))


def _share_out(ranges: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The ranges of each task: together `IMAGES_A_TASK` ids at most."""
    shares: list[list[tuple[int, int]]] = []
    size = IMAGES_A_TASK
    for low, end in (part for edges in ranges for part in split_ids(*edges, most=IMAGES_A_TASK)):
        size += end - low
        if size > IMAGES_A_TASK:
            shares.append([])
            size = end - low
        shares[-1].append((low, end))
    return shares


def _exact_of_ranges(
    job: RangeJob, ranges: Sequence[tuple[int, int]], queries: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32], int]:
    num_vectors = 0

    def batches() -> Iterator[ImageVectors]:
        nonlocal num_vectors
        for batch in _read(job.open_table(), ranges):
            num_vectors += len(batch.vectors)
            yield batch

    return *exact_top_images(batches(), queries, RANKED + 1), num_vectors


def _read(table: Any, ranges: Sequence[tuple[int, int]]) -> Iterator[ImageVectors]:
    """The images of long ranges by scans; those of short ones by their ids, since each scan costs."""
    short = [np.empty(0, np.int64)]
    for low, end in ranges:
        if end - low > IMAGES_A_READ:
            yield from read_vectors(table, low, end, batch_rows=IMAGES_A_READ)
        else:
            short.append(np.arange(low, end))
    ids = np.concatenate(short)
    for start in range(0, len(ids), IMAGES_A_READ):
        yield take_vectors(table, ids[start : start + IMAGES_A_READ])


def check_recall(recall: Recall, *, least: float, codec: Codec | None) -> None:
    """Raise when a new build finds less than it has to.

    Args:
        recall: As `measure_recall` gives it: more lists would find no more.
        least: `min_recall`.
        codec: Of the build; None where there is nothing to find.

    Raises:
        StageError: With the settings to change.
    """
    if codec is None or recall.recall is None or recall.recall >= least:
        return
    raise StageError(
        "verify",
        f"recall@{RANKED} is {recall.recall:.3f}, under min_recall {least:g}; not published: more than "
        f"{recall.nprobe:,} lists find no more, {codec.factory} is what loses it; raise the bits of --codec "
        "(HR,IVF,RaBitQ8 or IVF,Flat), or lower --min-recall",
    )
