"""Build: new rows of `images.lance` → immutable FAISS segments on one trained codec, one Ray task each.

The driver holds ids and records only; vectors go from the table to a task and from there to the store. A task
that is retried writes the same file again. Whenever a segment is done it is noted in the draft, so that a run
that dies is gone on from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray

from for_ray.errors import StageError
from for_ray.index.changes import GoneImages, find_gone
from for_ray.index.codec import codec_record, codec_to_bytes, train_codec
from for_ray.index.drafts import find_draft, write_draft
from for_ray.index.growth import list_imbalance, why_retrain
from for_ray.index.plan import DEFAULT_MEMORY_BYTES, IndexPlan, plan_index
from for_ray.index.segment import build_segment
from for_ray.index.table import count_held, open_version, read_vectors, take_vectors
from for_ray.schema import Codec, Segment, Snapshot
from for_ray.stages.built import Built, collect, draft_of
from for_ray.stages.cluster import Cluster
from for_ray.stages.ranges import RangeJob
from for_ray.storage import local_copy, temporary_folder, upload, write_bytes

SLOTS_OF_AN_IMAGE = 16
"""Vectors that one image gives to the codec's training sample: enough of its slots to see them all over many
images, and enough images to see all kinds of them without reading the whole table."""

SPARE_IMAGES = 1.5
"""How many more images are drawn than would do if all had the mean number of slots."""

IMAGES_A_READ = 512
"""Images whose vectors are in memory at once, next to the segment."""

TASK_RETRIES = 3


def update_segments(
    job: RangeJob,
    base: Snapshot | None,
    *,
    cluster: Cluster,
    wanted: str | None,
    floor: float,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    on_progress: Callable[[int], None],
) -> Built:
    """Build what the last snapshot's segments lack; all of them where its codec does not do any more.

    What costs is what changed since the base, which may be any published state: images that are gone since
    then are counted as dead where they lie, images behind its last segment are new. What a run that died has
    built on the same base is not built again.

    Args:
        job: What the tasks have to know.
        base: The snapshot of this encoder to go on from, as a rule the last one.
        cluster: Where the tasks run; left alone when there is nothing to build.
        wanted: The codec that the user asked for.
        floor: The recall that is enough.
        memory_bytes: What a task may hold, for the plan: lists and segments follow from it.
        on_progress: Called with the number of segments that are done.

    Raises:
        ConfigError: The wanted codec is refused.
        StageError: A segment does not hold what the table holds.
    """
    images = job.open_table()
    dim = images.schema.field("vectors").type.value_type.list_size
    for kept in _starts(job, images, base):
        added = [count_held(images, *gap) for gap in kept.gaps()]
        num_vectors = kept.num_live + sum(each.num_vectors for each in added)
        plan = plan_index(num_vectors, dim, codec=wanted, target_recall=floor, memory_bytes=memory_bytes)
        reason = kept.why_retrain(plan, wanted=wanted, floor=floor)
        if reason is None:
            break
    built = Built(
        codec=kept.codec,
        segments=[],
        deleted=kept.deleted[:0],
        num_vectors=num_vectors,
        nprobe=max(1, plan.nprobe),
        is_new=False,
        vectors_per_segment=plan.vectors_per_segment,
        retrained=reason or kept.retrained,
        base_id=base.snapshot_id if base else None,
    )
    if not num_vectors:
        return built
    codec = kept.codec
    if codec is None or reason is not None:
        codec = _train_on(cluster, job, plan, wanted=wanted)
        kept, added = _nothing(codec), [count_held(images, 0)]
    built = built._replace(codec=codec, segments=kept.segments, deleted=kept.deleted, is_new=kept.is_new)
    ranges = [edges for each in added for edges in each.cut(plan.vectors_per_segment)]
    built = _build_all(cluster, job, built, ranges, first_new=kept.first_new, on_progress=on_progress)
    if (found := sum(segment.num_live for segment in built.segments)) != num_vectors:
        raise StageError("build", f"segments hold {found} vectors of {num_vectors}; run again")
    return built._replace(codec=_described(codec, built.segments, wanted=wanted))


class _Kept(NamedTuple):
    """What is gone on from.

    Attributes:
        codec: None where there is none yet.
        segments: On it, by image id.
        deleted: Ids of images that are dead in them; ascending.
        first_new: From this image id on, what no segment covers is to be built.
        recall: As last measured with these segments; None where it was not.
        is_new: Whether a run that was not published has built some of them.
        retrained: Why it trained the codec anew.
    """

    codec: Codec | None
    segments: list[Segment]
    deleted: NDArray[np.int64]
    first_new: int = 0
    recall: float | None = None
    is_new: bool = False
    retrained: str | None = None

    @property
    def num_live(self) -> int:
        """Vectors that searches may find."""
        return sum(segment.num_live for segment in self.segments)

    def gaps(self) -> list[tuple[int, int | None]]:
        """The ranges of image ids that are to be built; the last one has no end."""
        gaps: list[tuple[int, int | None]] = []
        start = self.first_new
        for segment in self.segments:
            if segment.first_image_id > start:
                gaps.append((start, segment.first_image_id))
            start = max(start, segment.end_image_id)
        return [*gaps, (start, None)]

    def why_retrain(self, plan: IndexPlan, *, wanted: str | None, floor: float) -> str | None:
        """As `growth.why_retrain`; None where there is no codec, or nothing that it is for."""
        if self.codec is None or not plan.num_vectors:
            return None
        return why_retrain(self.codec, plan, self.segments, wanted=wanted, recall=self.recall, floor=floor)


def _nothing(codec: Codec | None = None) -> _Kept:
    return _Kept(codec, [], np.empty(0, np.int64))


def _starts(job: RangeJob, images: Any, base: Snapshot | None) -> Iterator[_Kept]:
    """What can be gone on from, the best first: what a run that died has built, the base, or nothing."""
    draft = find_draft(job.layout, job.fingerprint, base_id=base.snapshot_id if base else None)
    if draft is not None:
        record = draft.record
        kept = _carry_over(images, record.segments, draft.deleted, version=record.images_version)
        if kept is not None:
            if base and base.codec and base.codec.codec_id == record.codec.codec_id:
                kept = kept._replace(recall=base.recall_at_50)
            yield kept._replace(
                codec=record.codec,
                first_new=record.first_new,
                is_new=record.is_new,
                retrained=record.retrained,
            )
    yield _from_snapshot(images, base) if base else _nothing()


def _from_snapshot(images: Any, base: Snapshot) -> _Kept:
    carried = None
    # A snapshot that does not say how much of its segments is dead: they are built again.
    if sum(segment.num_live for segment in base.segments) == base.num_vectors:
        deleted = np.asarray(base.deleted_image_ids, np.int64)
        carried = _carry_over(images, base.segments, deleted, version=base.images_version)
    kept = carried or _nothing()
    end = max((segment.end_image_id for segment in kept.segments), default=0)
    return kept._replace(codec=base.codec, first_new=end, recall=base.recall_at_50)


def _carry_over(
    images: Any, segments: Sequence[Segment], deleted: NDArray[np.int64], *, version: int
) -> _Kept | None:
    """Segments as the table sees them now: what has left it since a version of it is dead.

    None where nobody knows any more what has: the version is lost.
    """
    before = open_version(images, version)
    if before is None:
        return None
    gone = find_gone(before, images)
    counted, is_inside = _count_dead(segments, gone)
    return _Kept(None, counted, np.union1d(deleted, gone.image_ids[is_inside]))


def _count_dead(segments: Sequence[Segment], gone: GoneImages) -> tuple[list[Segment], NDArray[np.bool_]]:
    """The segments, each with the vectors of gone images added to its dead; and which images they hold."""
    is_inside = np.zeros(len(gone.image_ids), bool)
    counted = []
    for segment in segments:
        first, end = np.searchsorted(gone.image_ids, (segment.first_image_id, segment.end_image_id))
        is_inside[first:end] = True
        num_dead = segment.num_dead + int(gone.num_vectors[first:end].sum())
        counted.append(segment.model_copy(update={"num_dead": num_dead}))
    return counted, is_inside


def _described(codec: Codec, segments: Sequence[Segment], *, wanted: str | None) -> Codec:
    """The codec with what was asked for now, and with what its lists are like once that can be told."""
    imbalance = list_imbalance(segments, codec.nlist) if codec.imbalance is None else codec.imbalance
    return codec.model_copy(update={"wanted": wanted, "imbalance": imbalance})


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
    built: Built,
    ranges: list[tuple[int, int]],
    *,
    first_new: int,
    on_progress: Callable[[int], None],
) -> Built:
    """With a segment of each range of image ids that has vectors, one task each; kept as they come."""
    if not ranges:
        return built
    cpus = cluster.task_cpus
    task = ray.remote(_build).options(
        num_cpus=cpus, memory=cluster.task_memory_bytes, max_retries=TASK_RETRIES
    )

    def keep(record: dict[str, Any] | None) -> None:
        nonlocal built
        segments = [*built.segments, Segment.model_validate(record)] if record else built.segments
        segments = sorted(segments, key=lambda segment: segment.first_image_id)
        built = built._replace(segments=segments, is_new=True)
        write_draft(job.layout, job.fingerprint, draft_of(job, built, first_new=first_new))

    keep(None)  # the codec, which may have taken long to train
    running = [task.remote(job, built.codec, first, end, cpus) for first, end in ranges]
    collect(running, on_done=lambda _, record: keep(record), on_progress=on_progress)
    return built


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


def _build(job: RangeJob, codec: Codec, first: int, end: int, threads: int) -> dict[str, Any] | None:
    """The record of the range's segment; None where it has no vectors. `threads` are the task's CPUs."""
    table = job.open_table()
    name = f"segment-{job.run_id}-{first:012d}.faiss"
    num_read = 0

    def batches() -> Iterator[tuple[NDArray[np.int64], NDArray[np.float16]]]:
        nonlocal num_read
        for batch in read_vectors(table, first, end, batch_rows=IMAGES_A_READ):
            num_read += len(batch.vectors)
            yield batch.vector_ids, batch.vectors

    codec_path = local_copy(job.layout.segment_uri(job.fingerprint, codec.file_name), sha256=codec.sha256)
    with temporary_folder() as folder:
        built = build_segment(codec_path, batches(), folder / name, threads=threads)
        num_held = count_held(table, first, end).num_vectors
        if not built.num_vectors == num_read == num_held:
            message = (
                f"{name} holds {built.num_vectors} vectors, {num_read} were read of {num_held}; run again"
            )
            raise StageError("build", message)
        if not num_read:
            return None
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
        imbalance=built.imbalance,
    ).model_dump()
