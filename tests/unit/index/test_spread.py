"""Where vectors lie: ranges of ids that leave nothing out, hold nothing twice, and share vectors equally."""

from __future__ import annotations

import numpy as np
import pytest

from for_ray.index.spread import Spread


def spread(image_ids, counts, *, first: int = 0, most_blocks: int = 1 << 10) -> Spread:
    held = Spread(first, most_blocks=most_blocks)
    order = np.random.default_rng(0).permutation(len(image_ids))
    for part in np.array_split(order, 3):
        held.add(np.asarray(image_ids)[part], np.asarray(counts)[part])
    return held


def shares(held: Spread, image_ids, counts, most: int) -> list[int]:
    """The vectors of each range."""
    image_ids, counts = np.asarray(image_ids), np.asarray(counts)
    return [int(counts[(image_ids >= low) & (image_ids < high)].sum()) for low, high in held.cut(most)]


@pytest.mark.parametrize("first", [0, 17])
@pytest.mark.parametrize("count", [1, 7, 100, 1001])
@pytest.mark.parametrize("most", [1, 3, 50, 5000])
def test_ranges_cover_all_ids_once(first, count, most):
    ids = np.arange(first, first + count)
    held = spread(ids, np.ones(count, np.int64), first=first)
    ranges = held.cut(most)
    assert [number for low, high in ranges for number in range(low, high)] == ids.tolist()
    assert (held.num_images, held.num_vectors, held.end) == (count, count, first + count)
    if count < 1000:  # each id is counted apart
        assert len(ranges) == -(-count // most)
        assert max(shares(held, ids, np.ones(count, np.int64), most)) <= most


def test_live_images_at_the_tail_are_shared_equally():
    """After years of churn all live ids lie in the last twelfth: eight segments, not one with everything."""
    ids = np.arange(1_100_000, 1_200_000)
    counts = np.full(len(ids), 4)
    held = spread(ids, counts, most_blocks=1 << 12)
    found = shares(held, ids, counts, 50_000)
    assert (len(found), sum(found)) == (8, 400_000)
    assert max(found) <= 50_000 + 4 * 1024  # a block more: 1,200,000 ids in 4,096 blocks of 512
    assert (held.cut(50_000)[0][0], held.cut(50_000)[-1][1]) == (0, 1_200_000)


def test_images_with_many_vectors_make_shorter_ranges():
    counts = np.r_[np.full(10, 90), np.full(90, 10)]
    found = shares(spread(np.arange(100), counts), np.arange(100), counts, 450)
    assert found == [450, 450, 450, 450]


def test_nothing_needs_no_range():
    assert Spread(5).cut(10) == []
    quarantined = spread([5, 6], [0, 0], first=5)
    assert (quarantined.num_images, quarantined.end, quarantined.cut(10)) == (2, 7, [])


def test_one_image_with_more_than_a_range_may_have():
    assert spread([3, 4], [200, 1], first=0).cut(100) == [(0, 4), (4, 5)]
