"""Which segments are rewritten, so that they stay few and little of them is dead.

Sizes are those of a binary counter: a segment has more live vectors than all newer ones together, or it and
the next one are too large to be one. Of N vectors in segments of at most M there are then no more than
2·N/M + log2(M) + 1 segments, and a vector is rewritten when its segment at least doubles, which is log2(M)
times, and when too much of what lies around it is dead.
"""

from __future__ import annotations

from collections.abc import Sequence

from for_ray.schema import Segment

MOST_DEAD_SHARE = 0.2
"""Of a segment's vectors: searches read them in vain, and a snapshot lists their images. At 1 % of changes a
night a segment is rewritten for it every 22 nights."""


def choose_merges(
    segments: Sequence[Segment], *, most_vectors: int, most_dead: float = MOST_DEAD_SHARE
) -> list[list[Segment]]:
    """Runs of neighbours to rewrite as one segment each; a run of one is a segment that is too dead.

    From old to new: a segment that is outweighed by all newer ones together takes in as many of those next
    to it as fit.

    Args:
        segments: By image id, old to new; each with live vectors.
        most_vectors: The most that a merged segment may have.
        most_dead: The share of a segment's vectors that may be dead.
    """
    runs = []
    newer = sum(segment.num_live for segment in segments)
    start = 0
    while start < len(segments):
        run = _run_from(segments, start, newer=newer - segments[start].num_live, most_vectors=most_vectors)
        if len(run) > 1 or run[0].num_dead > most_dead * run[0].num_vectors:
            runs.append(run)
        newer -= sum(segment.num_live for segment in run)
        start += len(run)
    return runs


def _run_from(segments: Sequence[Segment], start: int, *, newer: int, most_vectors: int) -> list[Segment]:
    """The segment at `start` with those that it takes in; `newer`: live vectors behind it."""
    run = [segments[start]]
    size = run[0].num_live
    if size > newer:
        return run
    for segment in segments[start + 1 :]:
        size += segment.num_live
        if size > most_vectors:
            break
        run.append(segment)
    return run
