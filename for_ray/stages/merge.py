"""Merge: segments that are too small or too dead → fewer, without gone images, one Ray task each.

The driver holds records and the ids of gone images. A task that is retried writes the same file again; the
old files stay where they are, for snapshots that name them. Whenever a segment is done it is noted in the
draft, so that a run that dies is gone on from.

What a task holds in memory does not grow with the segments (see `index.merge`). A merged one has no more than
a build may hold since searches fetch segments whole, and the task needs disk for twice its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from for_ray.errors import StageError
from for_ray.index.drafts import write_draft
from for_ray.index.merge import merge_segments
from for_ray.index.search import NUM_FETCHERS
from for_ray.index.tiers import choose_merges
from for_ray.schema import Segment
from for_ray.stages.built import Built, collect, draft_of
from for_ray.stages.cluster import Cluster
from for_ray.stages.ranges import RangeJob
from for_ray.storage import local_copy, temporary_folder, upload

TASK_RETRIES = 3


def merge_small(
    job: RangeJob, built: Built, *, cluster: Cluster, on_progress: Callable[[int], None] = lambda _: None
) -> Built:
    """Rewrite what `choose_merges` names, and drop segments without a live vector.

    What searches find stays the same. Ids of gone images are kept only for segments that still hold them.

    Args:
        job: What the tasks have to know; its run id goes into the names of the files.
        built: Of this run.
        cluster: Where the tasks run; left alone when there is nothing to merge.
        on_progress: Called with the number of segments that are written.

    Raises:
        StageError: A merged segment does not hold what its parts hold.
    """
    live = [segment for segment in built.segments if segment.num_live]
    runs = choose_merges(live, most_vectors=built.vectors_per_segment)
    built = _with_segments(built, live)
    if not runs:
        return built
    # Copying is not what FAISS has threads for.
    task = ray.remote(_merge).options(num_cpus=1, memory=cluster.task_memory_bytes, max_retries=TASK_RETRIES)
    end = max(segment.end_image_id for segment in live)

    def replace(place: int, record: dict[str, Any]) -> None:
        nonlocal built
        parts = {segment.segment_id for segment in runs[place]}
        segments = [segment for segment in built.segments if segment.segment_id not in parts]
        built = _with_segments(built, [*segments, Segment.model_validate(record)])
        write_draft(job.layout, job.fingerprint, draft_of(job, built, first_new=end))

    running = [task.remote(job, run, _within(built.deleted, run)) for run in runs]
    collect(running, on_done=replace, on_progress=on_progress)
    return built


def _with_segments(built: Built, segments: Sequence[Segment]) -> Built:
    """These segments instead, by image id, and of the deleted images those that are dead in them."""
    segments = sorted(segments, key=lambda segment: segment.first_image_id)
    dead = [_within(built.deleted, [each]) for each in segments if each.num_dead]
    return built._replace(segments=segments, deleted=np.concatenate([built.deleted[:0], *dead]))


def _within(image_ids: NDArray[np.int64], run: Sequence[Segment]) -> NDArray[np.int64]:
    """Those of the ascending ids that neighbouring segments cover."""
    first, end = np.searchsorted(image_ids, (run[0].first_image_id, run[-1].end_image_id))
    return image_ids[first:end]


def _merge(job: RangeJob, run: list[Segment], dead_image_ids: NDArray[np.int64]) -> dict[str, Any]:
    first, end = run[0].first_image_id, run[-1].end_image_id
    # Both ends: the first part may be of this run, too, and then has its name from the first.
    name = f"segment-{job.run_id}-{first:012d}-{end:012d}.faiss"
    with (
        temporary_folder() as folder,
        ThreadPoolExecutor(NUM_FETCHERS) as fetchers,
    ):

        def fetch(segment: Segment) -> Path:
            uri = job.layout.segment_uri(job.fingerprint, segment.file_name)
            return local_copy(uri, sha256=segment.sha256, cache_path=folder / "parts")

        paths = list(fetchers.map(fetch, run))
        merged = merge_segments(paths, folder / name, dead_image_ids=dead_image_ids)
        num_live = sum(segment.num_live for segment in run)
        if merged.num_vectors != num_live:
            message = f"{name} holds {merged.num_vectors} vectors, its parts have {num_live} live ones"
            raise StageError("merge", f"{message}; jobs/index.py --verify says what is wrong with them")
        upload(merged.path, job.layout.segment_uri(job.fingerprint, name))
    return Segment(
        segment_id=name.removesuffix(".faiss").removeprefix("segment-"),
        codec_id=run[0].codec_id,
        file_name=name,
        sha256=merged.sha256,
        num_bytes=merged.num_bytes,
        num_vectors=merged.num_vectors,
        first_image_id=first,
        end_image_id=end,
        imbalance=merged.imbalance,
    ).model_dump()
