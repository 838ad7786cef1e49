"""Which segments are merged: they stay few, little of them is dead, and a vector is not rewritten often."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from for_ray.index.tiers import MOST_DEAD_SHARE, choose_merges
from for_ray.schema import Segment


def segment(num_live: int, *, num_dead: int = 0, first: int = 0, end: int = 1) -> Segment:
    return Segment(
        segment_id=f"{first}-{end}",
        codec_id="c",
        file_name="f",
        sha256="0",
        num_bytes=1,
        num_vectors=num_live + num_dead,
        first_image_id=first,
        end_image_id=end,
        num_dead=num_dead,
    )


def row(sizes: Sequence[int | tuple[int, int]]) -> list[Segment]:
    """Segments of (live, dead) vectors, one image each."""
    pairs = [size if isinstance(size, tuple) else (size, 0) for size in sizes]
    return [segment(*pair[:1], num_dead=pair[1], first=at, end=at + 1) for at, pair in enumerate(pairs)]


def merge(segments: Sequence[Segment], runs: Sequence[Sequence[Segment]]) -> list[Segment]:
    """What the segments are after the merges; a run must be of neighbours, and none in two."""
    merged = list(segments)
    for run in runs:
        at = merged.index(run[0])
        assert merged[at : at + len(run)] == run
        size = sum(part.num_live for part in run)
        merged[at : at + len(run)] = [segment(size, first=run[0].first_image_id, end=run[-1].end_image_id)]
    return merged


def most_segments(num_live: int, most_vectors: int) -> float:
    return 2 * num_live / most_vectors + math.log2(most_vectors) + 1


@pytest.mark.parametrize(
    ("sizes", "runs"),
    [
        ([], []),
        ([5], []),
        ([240, 48], []),
        ([48, 48], [[48, 48]]),
        ([2, 1, 1], [[2, 1, 1]]),
        ([4, 1, 1], [[1, 1]]),
        ([8, 4, 2, 1], []),
        ([8, 4, 2, 1, 1], [[8, 4, 2, 1, 1]]),
        ([1, 50], [[1, 50]]),  # the older one alone would stay for ever
        ([60, 50, 3, 3], [[3, 3]]),  # 60 and 50 are too large together
        ([60, 30, 20, 10], [[60, 30]]),  # 20 does not fit in, and is not outweighed by 10
        ([100, 100, 100], []),
        ([50, 50, 50, 50], [[50, 50], [50, 50]]),
        ([250, 1, 1], [[1, 1]]),  # made when segments could be larger
    ],
)
def test_what_is_outweighed_takes_in_what_fits(sizes, runs):
    chosen = choose_merges(row(sizes), most_vectors=100)
    assert [[part.num_live for part in run] for run in chosen] == runs


def test_what_is_too_dead_is_rewritten_alone():
    segments = row([(80, 20), (39, 10), (20, 5), (5, 1)])
    assert choose_merges(segments, most_vectors=100) == [[segments[1]]]
    assert choose_merges(segments, most_vectors=100, most_dead=0.1) == [[each] for each in segments]
    assert choose_merges(segments, most_vectors=100, most_dead=0.21) == []


def test_what_is_alive_counts_for_the_room():
    segments = row([(45, 55), (50, 50)])
    assert choose_merges(segments, most_vectors=100) == [segments]
    assert choose_merges(segments, most_vectors=94) == [[segments[0]], [segments[1]]]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 500)), max_size=40),
    most_vectors=st.integers(1, 3000),
)
@settings(max_examples=300, deadline=None)
def test_after_it_segments_are_few_and_alive(sizes, most_vectors):
    segments = row(sizes)
    runs = choose_merges(segments, most_vectors=most_vectors)
    for run in runs:
        assert len(run) > 1 or run[0].num_dead > MOST_DEAD_SHARE * run[0].num_vectors
        assert len(run) == 1 or sum(part.num_live for part in run) <= most_vectors
    merged = merge(segments, runs)
    num_live = sum(each.num_live for each in segments)
    assert sum(each.num_live for each in merged) == num_live
    largest = max([most_vectors, *(each.num_live for each in segments)])
    assert len(merged) <= 2 * num_live / most_vectors + math.log2(largest) + 1
    assert all(each.num_dead <= MOST_DEAD_SHARE * each.num_vectors for each in merged)
    assert choose_merges(merged, most_vectors=most_vectors) == []


@pytest.mark.parametrize("whose", ["all", "old", "new"])
@pytest.mark.parametrize("most_vectors", [10_000_000, 300_000, 100_000, 10_000])
def test_a_year_of_nights(most_vectors, whose):
    """A million vectors, 1 % new and 1 % gone each night; of all images, or rather of old or new ones."""
    random = np.random.default_rng(0)
    segments: list[Segment] = []
    num_built, num_rewritten, num_nights = 0, 0, 365

    def add(count: int) -> None:
        nonlocal num_built
        for part in np.array_split(np.arange(num_built, num_built + count), -(-count // most_vectors)):
            segments.append(segment(len(part), first=int(part[0]), end=int(part[-1]) + 1))
        num_built += count

    add(1_000_000)
    for _ in range(num_nights):
        live = np.array([each.num_live for each in segments])
        age = np.arange(len(live), 0, -1)
        weights = live * {"all": age**0, "old": age**2, "new": 1 / age}[whose]
        count = int(random.integers(5_000, 15_000))
        gone = np.minimum(random.multinomial(count, weights / weights.sum()), live)
        segments = [
            each.model_copy(update={"num_dead": each.num_dead + int(dead)})
            for each, dead in zip(segments, gone, strict=True)
            if dead < each.num_live
        ]
        add(count)
        runs = choose_merges(segments, most_vectors=most_vectors)
        num_rewritten += sum(part.num_live for run in runs for part in run)
        segments = merge(segments, runs)
        num_live = sum(each.num_live for each in segments)
        assert len(segments) <= most_segments(num_live, most_vectors)
        assert all(each.num_dead <= MOST_DEAD_SHARE * each.num_vectors for each in segments)
    # A night's segment has 1/100 of all vectors and doubles less than seven times; what is dead adds little.
    assert num_rewritten <= 7 * num_built
    assert num_rewritten <= 0.1 * 1_000_000 * num_nights
