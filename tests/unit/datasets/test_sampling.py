"""Order, shares and lists: the same on any number of workers, at any place."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from for_ray.datasets.labelled import LabelledImages, Ragged
from for_ray.datasets.sampling import below, epoch_batches, pad, pick_share, relative_names

NAMES = [f"{number:05d}.jpg" for number in range(1000)]


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (64, 64), (65, 64), (100, 7), (999, 10)])
def test_every_row_comes_once_an_epoch_in_batches_of_nearly_one_size(rows, size):
    batches = epoch_batches(rows, batch_size=size, seed=3, epoch=5)
    assert sorted(np.concatenate(batches).tolist()) == list(range(rows))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1


def test_the_order_hangs_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(epoch_batches(50, batch_size=8, seed=seed, epoch=epoch)).tolist()

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


@pytest.mark.parametrize(
    ("share", "count"), [(0.0, 0), (0.0001, 1), (0.005, 5), (0.01, 10), (0.5, 500), (1.0, 1000)]
)
def test_a_share_has_its_size(share, count):
    assert pick_share(NAMES, share, key="labelled 0").sum() == count


def test_a_larger_share_holds_a_smaller_one_and_folds_differ():
    small, large = (pick_share(NAMES, share, key="labelled 0") for share in (0.01, 0.1))
    assert (large[small]).all()
    other = pick_share(NAMES, 0.1, key="labelled 1")
    assert 0 < (large & other).sum() < 50  # 10 of 1,000 by chance


def test_a_share_hangs_on_names_not_on_places():
    """The same images are chosen when the set is listed in another order."""
    backwards = pick_share(NAMES[::-1], 0.01, key="labelled 0")[::-1]
    assert (backwards == pick_share(NAMES, 0.01, key="labelled 0")).all()


def test_the_choice_never_changes_between_versions():
    """Golden: `[n for n, c in zip(NAMES, pick_share(NAMES, 0.003, key="labelled 0")) if c]`, 2026-11-22."""
    chosen = pick_share(NAMES, 0.003, key="labelled 0")
    assert [name for name, is_in in zip(NAMES, chosen, strict=True) if is_in] == [
        "00035.jpg",
        "00608.jpg",
        "00787.jpg",
    ]


def test_names_do_not_tell_where_the_set_lies():
    def names(place: str) -> list[str]:
        uris = pa.chunked_array([[f"{place}/a/1.jpg", f"{place}/2.jpg"]])
        lists = Ragged.of([[], []])
        return relative_names(LabelledImages("x", uris, (), np.empty(0, bool), lists, place))

    assert names("/data/coco") == names("s3://bucket/images") == ["a/1.jpg", "2.jpg"]


def test_lists_are_padded():
    assert pad(Ragged.of([[3, 1], [], [2]])).tolist() == [[1, 3], [-1, -1], [2, -1]]
    assert pad(Ragged.of([[], []])).tolist() == [[-1], [-1]]
    assert pad(Ragged.of([])).shape == (0, 1)


def test_lists_are_cut_at_a_limit():
    cut = below(Ragged.of([[0, 5, 9], [], [7], [1]]), 6)
    assert [cut.row(index).tolist() for index in range(len(cut))] == [[0, 5], [], [], [1]]
