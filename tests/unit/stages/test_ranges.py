"""Ranges of image ids: nothing left out, nothing twice, none too large."""

from __future__ import annotations

import numpy as np
import pytest

from for_ray.stages.ranges import split_ids


@pytest.mark.parametrize("first", [0, 17])
@pytest.mark.parametrize("count", [1, 7, 100, 1001])
@pytest.mark.parametrize("most", [1, 3, 50, 5000])
def test_ranges_cover_all_ids_once(first, count, most):
    ranges = split_ids(first, first + count, most=most)
    ids = [number for low, high in ranges for number in range(low, high)]
    assert ids == list(range(first, first + count))
    assert len(ranges) == -(-count // most)
    sizes = np.array([high - low for low, high in ranges])
    assert sizes.max() <= most
    assert sizes.max() - sizes.min() <= 1


def test_nothing_needs_no_range():
    assert split_ids(5, 5, most=10) == []
