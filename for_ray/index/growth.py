"""When an index's codec has to be trained anew: it is too small, the images are others, or it finds less.

Each reason goes with the training itself: it compares what is with what was when the codec was new, so that
no index is trained anew every night for the same one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from for_ray.index.plan import DEFAULT_MEMORY_BYTES, IndexPlan, bits_of, plan_index
from for_ray.schema import Codec, Segment, Snapshot, SnapshotRecord

GROWTH_OF_LISTS = 4
"""A codec is trained anew when the plan has this many times its lists. Lists grow with the root of the number
of vectors: the index has then grown sixteenfold, and its lists have become four times as long as planned."""

GROWTH_OF_IMBALANCE = 2
"""And when a search scans this many times what it would with lists as equal as they were."""

LEAST_VECTORS, LEAST_PER_LIST = 10_000, 8
"""Imbalance is that of segments with so many vectors a list, and only where they have so many in all: slots
of one image are alike, and outweigh everything else where there are few images."""

RECALL_SLACK = 0.01
"""How far recall may be under the floor: it is measured on other segments each time."""


def why_retrain(
    codec: Codec,
    plan: IndexPlan,
    segments: Sequence[Segment],
    *,
    wanted: str | None,
    recall: float | None,
    floor: float,
) -> str | None:
    """The reason for another codec, as the end of a line; None while this one does.

    Args:
        codec: The index's.
        plan: Of the vectors that there are now.
        segments: On the codec.
        wanted: The factory string that the user asked for, as the plan was given it.
        recall: As last measured.
        floor: The recall that is enough.
    """
    kinds = codec_kind(plan.factory), codec_kind(codec.factory)
    if kinds[0] != kinds[1] and not _was_larger(codec, plan, wanted=wanted, floor=floor):
        return f"{kinds[0]} takes the place of {kinds[1]}"
    if wanted != codec.wanted and _names_lists(wanted) and plan.nlist != codec.nlist:
        return f"{plan.factory} takes the place of {codec.factory}"
    if plan.nlist >= GROWTH_OF_LISTS * codec.nlist:
        return f"{plan.num_vectors:,} vectors want {plan.nlist} lists, it has {codec.nlist}"
    imbalance = list_imbalance(segments, codec.nlist)
    if imbalance and codec.imbalance and imbalance >= GROWTH_OF_IMBALANCE * codec.imbalance:
        return f"the images have drifted: its lists' imbalance was {codec.imbalance:.2f}, is {imbalance:.2f}"
    if recall is not None and recall < floor - RECALL_SLACK and (codec.recall_at_50 or 0.0) >= floor:
        return f"recall@50 was {codec.recall_at_50:.3f}, is {recall:.3f}, under {floor:g}"
    return None


def why_retrain_snapshot(
    snapshot: Snapshot, *, wanted: str | None, floor: float, memory_bytes: int = DEFAULT_MEMORY_BYTES
) -> str | None:
    """The same of a snapshot as it is; None where it has no vectors. Reads nothing."""
    codec = snapshot.codec
    if codec is None or not snapshot.num_vectors:
        return None
    plan = plan_index(
        snapshot.num_vectors, codec.dim, codec=wanted, target_recall=floor, memory_bytes=memory_bytes
    )
    recall = snapshot.recall_at_50
    return why_retrain(codec, plan, snapshot.segments, wanted=wanted, recall=recall, floor=floor)


def is_measured_for(snapshot: SnapshotRecord, target: float) -> bool:
    """Whether its `nprobe` was chosen for so much recall, or finds it anyway; or there is nothing to find."""
    recall = snapshot.recall_at_50
    return recall is None or recall >= target or (snapshot.target_recall or 0.0) >= target


def list_imbalance(segments: Sequence[Segment], nlist: int) -> float | None:
    """How many times the vectors of equal lists a search scans, whatever the segments' sizes; at least 1.

    FAISS's factor of a segment is nlist·Σ(n_i/n)², which counts each vector as its own neighbour: n vectors
    at random in equal lists have 1 + (nlist - 1)/n. Without these pairs it is the same for all n.

    Returns:
        The mean over the segments, by vectors; None where there are too few vectors to tell.
    """
    num_vectors, total = 0, 0.0
    for segment in segments:
        size = segment.num_vectors
        # Real lists are never all equal: 1 is that of a segment which was not measured.
        if size < max(2, LEAST_PER_LIST * nlist) or segment.imbalance == 1.0:
            continue
        num_vectors += size
        total += size * (segment.imbalance * size - nlist) / (size - 1)
    return max(1.0, total / num_vectors) if num_vectors >= LEAST_VECTORS else None


def codec_kind(factory: str) -> str:
    """A factory string without what follows from the number of vectors: the lists, and how they are found."""
    return re.sub(r"IVF\d*(_HNSW\d*)?", "IVF", factory)


def _names_lists(wanted: str | None) -> bool:
    return wanted is not None and re.search(r"IVF\d", wanted) is not None


def _was_larger(codec: Codec, plan: IndexPlan, *, wanted: str | None, floor: float) -> bool:
    """Whether the plan chose both, and the codec's kind is that of twice the vectors, or has bits to spare.

    An index that shrinks keeps it until then: around the limit it would have another one every night. Where
    less recall is asked for than it finds, nothing is to be mended.
    """
    if wanted is not None or codec.wanted is not None:
        return False
    if 0 < bits_of(plan.factory) < bits_of(codec.factory):
        return True
    twice = plan_index(2 * plan.num_vectors, plan.dim, target_recall=floor)
    return codec_kind(twice.factory) == codec_kind(codec.factory)
