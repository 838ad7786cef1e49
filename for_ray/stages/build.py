"""Build: new rows of `images.lance` → immutable FAISS segments on one trained codec, one Ray task each.

The driver holds ids and records only; vectors go from the table to a task and from there to the store. A task
that is retried writes the same file again; files of a run that died carry its id, and nothing refers to them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray

from for_ray.errors import StageError
from for_ray.index.codec import codec_record, codec_to_bytes, train_codec
from for_ray.index.growth import is_outgrown
from for_ray.index.plan import IndexPlan, plan_index
from for_ray.index.segment import build_segment
from for_ray.index.table import (
    count_held,
    count_vectors,
    missing_image_ids,
    read_vectors,
    require_table,
    take_vectors,
)
from for_ray.schema import Codec, Segment, Snapshot
from for_ray.stages.cluster import Cluster
from for_ray.stages.ranges import RangeJob, split_images
from for_ray.storage import local_copy, upload, write_bytes

SLOTS_OF_AN_IMAGE = 16
"""Vectors that one image gives to the codec's training sample: enough of its slots to see them all over many
images, and enough images to see all kinds of them without reading the whole table."""

SPARE_IMAGES = 1.5
"""How many more images are drawn than would do if all had the mean number of slots."""

IMAGES_A_READ = 512
"""Images whose vectors are in memory at once, next to the segment."""

TASK_RETRIES = 3


class Built(NamedTuple):
    """What a snapshot can be published of.

    Attributes:
        codec: None where there are no vectors.
        segments: By image id.
        deleted: Ids of images that segments hold and the table does not; ascending.
        num_vectors: Of the images that the table holds.
        nprobe: Where to begin measuring.
        is_new: Whether there are other segments than the base has.
    """

    codec: Codec | None
    segments: list[Segment]
    deleted: NDArray[np.int64]
    num_vectors: int
    nprobe: int
    is_new: bool


def update_segments(
    job: RangeJob,
    base: Snapshot | None,
    *,
    cluster: Cluster,
    wanted: str | None,
    on_progress: Callable[[int], None],
) -> Built:
    """Build what the last snapshot's segments lack; all of them where its codec does not do any more.

    Args:
        job: What the tasks have to know.
        base: The last snapshot of this encoder.
        cluster: Where the tasks run; left alone when there is nothing to build.
        wanted: The codec that the user asked for.
        on_progress: Called with the number of segments that are done.

    Raises:
        ConfigError: The wanted codec is refused.
        StageError: A segment does not hold what the table holds.
    """
    images = job.open_table()
    dim = images.schema.field("vectors").type.value_type.list_size
    codec, segments = (base.codec, list(base.segments)) if base else (None, [])
    first = max((segment.end_image_id for segment in segments), default=0)
    deleted = missing_image_ids(images, 0, first)
    added = count_held(images, first)
    num_old = _count_left(job, base, deleted) if base else 0
    plan = plan_index(num_old + added.num_vectors, dim, codec=wanted)
    if not plan.num_vectors:
        return Built(codec, segments, deleted, 0, 1, is_new=False)
    if codec is None or is_outgrown(codec, plan):
        codec = _train_on(cluster, job, plan, wanted=wanted)
        segments, first, deleted = [], 0, np.empty(0, np.int64)
        added = count_held(images, 0)
    ranges = split_images(
        first,
        added.end,
        num_images=added.num_images if added.num_vectors else 0,
        images_per_segment=plan.vectors_per_segment * added.num_images // max(1, added.num_vectors),
    )
    new = _build_all(cluster, job, codec, ranges, on_progress=on_progress)
    num_built = sum(segment.num_vectors for segment in new)
    if num_built != added.num_vectors:
        raise StageError("build", f"segments hold {num_built} vectors of {added.num_vectors}; run again")
    return Built(codec, segments + new, deleted, plan.num_vectors, plan.nprobe, is_new=bool(new))


def _count_left(job: RangeJob, base: Snapshot, deleted: NDArray[np.int64]) -> int:
    """Vectors of the base's images that are still in the table."""
    gone = np.setdiff1d(deleted, np.asarray(base.deleted_image_ids, np.int64))
    before = require_table(job.layout.images_uri(job.fingerprint), version=base.images_version)
    return base.num_vectors - count_vectors(before, gone)


def _train_on(cluster: Cluster, job: RangeJob, plan: IndexPlan, *, wanted: str | None) -> Codec:
    cpus = cluster.task_cpus
    task = ray.remote(_train).options(
        num_cpus=cpus,
        num_gpus=cluster.task_gpus,
        memory=cluster.task_memory_bytes,
        max_retries=TASK_RETRIES,
    )
    return Codec.model_validate(ray.get(task.remote(job, plan, cpus, wanted)))


def _build_all(
    cluster: Cluster,
    job: RangeJob,
    codec: Codec,
    ranges: list[tuple[int, int]],
    *,
    on_progress: Callable[[int], None],
) -> list[Segment]:
    """A segment of each range of image ids, one task each; those that have vectors, by image id."""
    if not ranges:
        return []
    cpus = cluster.task_cpus
    task = ray.remote(_build).options(
        num_cpus=cpus, memory=cluster.task_memory_bytes, max_retries=TASK_RETRIES
    )
    running = [task.remote(job, codec, first, end, cpus) for first, end in ranges]
    waiting = list(running)
    while waiting:
        _, waiting = ray.wait(waiting, timeout=10)
        on_progress(len(running) - len(waiting))
    segments = [Segment.model_validate(record) for record in ray.get(running)]
    return [segment for segment in segments if segment.num_vectors]


def draw_vectors(table: Any, count: int) -> NDArray[np.float32]:
    """About `count` vectors of a table, evenly over its images, and of each over its slots.

    Returns:
        float32 [n, D], n at most `count`; the same for the same table.
    """
    held = count_held(table, 0)
    per_image = max(1.0, min(held.num_vectors / max(1, held.num_images), SLOTS_OF_AN_IMAGE))
    # Deleted ids are holes, and some images have fewer slots than the mean: what is too much is dropped.
    holes = held.end / max(1, held.num_images)
    ids = _draw_ids(0, held.end, int(SPARE_IMAGES * holes * count / per_image) + 1)
    num_slots = max(SLOTS_OF_AN_IMAGE, -(-count // max(1, len(ids))))
    random = np.random.default_rng(0)
    parts = []
    for start in range(0, len(ids), IMAGES_A_READ):
        drawn = take_vectors(table, ids[start : start + IMAGES_A_READ])
        parts.append(drawn.vectors[_draw_slots(drawn.offsets, num_slots, random=random)])
    sample = np.concatenate(parts)
    if len(sample) > count:
        sample = sample[np.sort(random.choice(len(sample), count, replace=False))]
    return sample.astype(np.float32)


def _draw_ids(first: int, end: int, count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(first, end - 1, max(0, min(count, end - first))).astype(np.int64))


def _draw_slots(offsets: NDArray[np.int64], count: int, *, random: np.random.Generator) -> NDArray[np.int64]:
    """Positions of at most `count` vectors of each image, drawn without an order."""
    counts = np.diff(offsets)
    images = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((random.random(len(images)), images))
    rank = np.arange(len(images)) - np.repeat(offsets[:-1], counts)
    return np.sort(order[rank < count])


def _train(job: RangeJob, plan: IndexPlan, threads: int, wanted: str | None) -> dict[str, Any]:
    sample = draw_vectors(job.open_table(), plan.training_vectors)
    content = codec_to_bytes(train_codec(sample, plan, threads=threads))
    codec = codec_record(content, plan, num_trained_on=len(sample), wanted=wanted)
    write_bytes(job.layout.segment_uri(job.fingerprint, codec.file_name), content)
    return codec.model_dump()


def _build(job: RangeJob, codec: Codec, first: int, end: int, threads: int) -> dict[str, Any]:
    table = job.open_table()
    name = f"segment-{job.run_id}-{first:012d}.faiss"
    num_read = 0

    def batches() -> Iterator[tuple[NDArray[np.int64], NDArray[np.float16]]]:
        nonlocal num_read
        for batch in read_vectors(table, first, end, batch_rows=IMAGES_A_READ):
            num_read += len(batch.vectors)
            yield batch.vector_ids, batch.vectors

    codec_path = local_copy(job.layout.segment_uri(job.fingerprint, codec.file_name), sha256=codec.sha256)
    with tempfile.TemporaryDirectory(prefix="for-ray-") as folder:
        built = build_segment(codec_path, batches(), Path(folder) / name, threads=threads)
        if built.num_vectors != num_read:
            raise StageError(
                "build", f"{name} holds {built.num_vectors} vectors of the {num_read} that were read"
            )
        upload(built.path, job.layout.segment_uri(job.fingerprint, name))
    return Segment(
        segment_id=name.removesuffix(".faiss").removeprefix("segment-"),
        codec_id=codec.codec_id,
        file_name=name,
        sha256=built.sha256,
        num_bytes=built.num_bytes,
        num_vectors=built.num_vectors,
        first_image_id=first,
        end_image_id=end,
    ).model_dump()
