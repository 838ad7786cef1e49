"""Boxes and duplicates against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn.functional import normalize

from for_ray.model.boxes import (
    apart_slots,
    attention_boxes,
    cluster_boxes,
    connected_pieces,
    distinct_slots,
    kept_slots,
)


def test_pieces_are_scipys() -> None:
    groups = torch.randint(3, (40, 9, 14), generator=torch.Generator().manual_seed(0))
    labels = connected_pieces(groups)
    for grid, label in zip(groups.numpy(), labels.numpy(), strict=True):
        for value in range(3):
            reference, count = ndimage.label(grid == value)
            inside = reference > 0
            pairs = set(zip(reference[inside].tolist(), label[inside].tolist(), strict=True))
            assert len(pairs) == count == len({mine for _, mine in pairs})


def test_a_spiral_is_one_piece() -> None:
    spiral = np.zeros((13, 13), np.int64)
    row, column, step = 0, -1, (0, 1)
    for length in (13, 12, 12, 10, 10, 8, 8, 6, 6, 4, 4, 2, 2):
        for _ in range(length):
            row, column = row + step[0], column + step[1]
            spiral[row, column] = 1
        step = (step[1], -step[0])
    labels = connected_pieces(torch.from_numpy(spiral)[None])[0].numpy()
    assert ndimage.label(spiral)[1] == 1
    assert len(np.unique(labels[spiral == 1])) == 1


def test_a_cluster_box_is_that_of_its_largest_piece() -> None:
    grid = torch.tensor(
        [
            [0, 1, 1, 0],
            [2, 1, 1, 0],
            [2, 2, 2, 0],
            [1, 2, 2, 0],
        ]
    )
    boxes = cluster_boxes(grid.view(1, -1), 3, 4, 4)
    assert boxes[0].tolist() == [[0.75, 0, 1, 1], [0.25, 0, 0.75, 0.5], [0, 0.25, 0.75, 1]]


def test_cluster_boxes_of_images_are_apart() -> None:
    grids = torch.randint(5, (8, 6, 7), generator=torch.Generator().manual_seed(1))
    grids[:, 0, :5] = torch.arange(5)  # every cluster has a cell
    together = cluster_boxes(grids.flatten(1), 5, 6, 7)
    for grid, boxes in zip(grids, together, strict=True):
        torch.testing.assert_close(cluster_boxes(grid.view(1, -1), 5, 6, 7)[0], boxes)
        for cluster in range(5):
            pieces, _ = ndimage.label((grid == cluster).numpy())
            sizes = np.bincount(pieces.ravel())[1:]
            candidates = []
            for piece in np.flatnonzero(sizes == sizes.max()) + 1:
                rows, columns = np.nonzero(pieces == piece)
                candidates.append(
                    [columns.min() / 7, rows.min() / 6, (columns.max() + 1) / 7, (rows.max() + 1) / 6]
                )
            assert any(boxes[cluster].tolist() == pytest.approx(one) for one in candidates)


def test_an_attention_box_is_around_the_peak() -> None:
    weights = torch.zeros(1, 2, 4, 5)
    weights[0, 0, 1, 1], weights[0, 0, 1, 2], weights[0, 0, 2, 2] = 1.0, 0.6, 0.5
    weights[0, 0, 1, 4] = 0.9  # as bright, but elsewhere
    weights[0, 0, 0, 1] = 0.4  # connected, but too dim
    weights[0, 1] = 0.05  # looks everywhere
    boxes = attention_boxes(weights.flatten(2), 4, 5)[0].tolist()
    assert boxes[0] == pytest.approx([0.2, 0.25, 0.6, 0.75])
    assert boxes[1] == [0, 0, 1, 1]


def greedy(vectors: torch.Tensor, threshold: float) -> list[bool]:
    kept: list[int] = []
    for slot in range(len(vectors)):
        if all(float(vectors[slot] @ vectors[other]) <= threshold for other in kept):
            kept.append(slot)
    return [slot in kept for slot in range(len(vectors))]


def test_distinct_slots_are_the_greedy_choice() -> None:
    generator = torch.Generator().manual_seed(2)
    vectors = normalize(torch.randn(30, 20, 4, generator=generator), dim=-1)
    keep = distinct_slots(vectors, 0.7)
    assert keep.tolist() == [greedy(image, 0.7) for image in vectors]
    assert 0.2 < keep.float().mean() < 0.8
    assert bool(keep[:, 0].all())


def test_a_long_chain_of_duplicates_loses_no_distinct_slot() -> None:
    """Each slot is like its neighbours only: the worst case for the rounds."""
    angles = torch.arange(40) * 0.1
    vectors = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    keep = distinct_slots(vectors, float(np.cos(0.15)))[0]
    expected = torch.tensor(greedy(vectors[0], float(np.cos(0.15))))
    assert bool(keep[expected].all())
    assert torch.equal(keep[:8], expected[:8])


def test_slots_apart_are_those_unlike_the_mean_of_their_image() -> None:
    """Against the rule written as a loop; in any batch and order the same slots are kept."""
    generator = torch.Generator().manual_seed(2)
    vectors = normalize(torch.randn(30, 20, 4, generator=generator) + torch.ones(4), dim=-1)
    keep = apart_slots(vectors, 0.8)
    for image, kept in zip(vectors.double().numpy(), keep.tolist(), strict=True):
        mean = image.mean(axis=0)
        assert kept == [bool(slot @ mean <= 0.8 * np.linalg.norm(mean)) for slot in image]
    assert 0.2 < keep.float().mean() < 0.8
    order = torch.randperm(20, generator=generator)
    assert torch.equal(torch.cat([apart_slots(image[None, order], 0.8) for image in vectors]), keep[:, order])


def test_one_slot_is_always_kept_apart_and_what_is_not_finite_never_beside_another() -> None:
    equal = normalize(torch.ones(2, 5, 3), dim=-1)
    assert apart_slots(equal, 0.9).sum(dim=1).tolist() == [1, 1]
    assert apart_slots(equal[:, :1], 0.9).tolist() == [[True], [True]]
    assert bool(apart_slots(equal, 1.0).all())
    near, far = normalize(torch.tensor([[1.0, 0.1], [0.0, 1.0]]), dim=-1)
    lost = torch.full((2,), torch.nan)
    vectors = torch.stack([near, lost, near, near, far])[None]
    assert apart_slots(vectors, 0.9).tolist() == [[False, False, False, False, True]]


def test_the_rule_names_who_keeps() -> None:
    vectors = normalize(torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]), dim=-1)
    assert kept_slots(vectors, 0.85, "distinct").tolist() == [[True, False, True]]
    assert kept_slots(vectors, 0.85, "apart").tolist() == [[False, False, True]]


def test_equal_slots_are_kept_once_and_a_threshold_of_one_keeps_all() -> None:
    vectors = normalize(torch.ones(2, 5, 3), dim=-1)
    assert distinct_slots(vectors, 0.97).tolist() == [[True, False, False, False, False]] * 2
    assert bool(distinct_slots(vectors, 1.0).all())
