"""Merge: segments that are too small or too dead → fewer, without gone images, one Ray task each.

The driver holds records and the ids of gone images. A task that is retried writes the same file again; the
old files stay where they are, for snapshots that name them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from for_ray.errors import StageError
from for_ray.index.merge import merge_segments
from for_ray.index.search import NUM_FETCHERS
from for_ray.index.tiers import choose_merges
from for_ray.schema import Segment
from for_ray.stages.built import Built
from for_ray.stages.cluster import Cluster
from for_ray.stages.ranges import RangeJob
from for_ray.storage import local_copy, upload

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
    merged = _merge_all(cluster, job, runs, built.deleted, on_progress=on_progress)
    rewritten = {segment.segment_id for run in runs for segment in run}
    kept = [segment for segment in live if segment.segment_id not in rewritten]
    return built._replace(
        segments=sorted(kept + merged, key=lambda segment: segment.first_image_id),
        deleted=np.concatenate([built.deleted[:0], *(_within(built.deleted, [each]) for each in kept)]),
    )


def _within(image_ids: NDArray[np.int64], run: Sequence[Segment]) -> NDArray[np.int64]:
    """Those of the ascending ids that neighbouring segments cover."""
    first, end = np.searchsorted(image_ids, (run[0].first_image_id, run[-1].end_image_id))
    return image_ids[first:end]


def _merge_all(
    cluster: Cluster,
    job: RangeJob,
    runs: Sequence[list[Segment]],
    deleted: NDArray[np.int64],
    *,
    on_progress: Callable[[int], None],
) -> list[Segment]:
    if not runs:
        return []
    # Copying is not what FAISS has threads for.
    task = ray.remote(_merge).options(num_cpus=1, memory=cluster.task_memory_bytes, max_retries=TASK_RETRIES)
    running = [task.remote(job, run, _within(deleted, run)) for run in runs]
    waiting = list(running)
    while waiting:
        _, waiting = ray.wait(waiting, timeout=10)
        on_progress(len(running) - len(waiting))
    return [Segment.model_validate(record) for record in ray.get(running)]


def _merge(job: RangeJob, run: list[Segment], dead_image_ids: NDArray[np.int64]) -> dict[str, Any]:
    first, end = run[0].first_image_id, run[-1].end_image_id
    # Both ends: the first part may be of this run, too, and then has its name from the first.
    name = f"segment-{job.run_id}-{first:012d}-{end:012d}.faiss"
    with (
        tempfile.TemporaryDirectory(prefix="for-ray-") as folder,
        ThreadPoolExecutor(NUM_FETCHERS) as fetchers,
    ):

        def fetch(segment: Segment) -> Path:
            uri = job.layout.segment_uri(job.fingerprint, segment.file_name)
            return local_copy(uri, sha256=segment.sha256, cache_path=Path(folder) / "parts")

        paths = list(fetchers.map(fetch, run))
        merged = merge_segments(paths, Path(folder) / name, dead_image_ids=dead_image_ids)
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
