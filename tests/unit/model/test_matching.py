"""Hungarian matching against all permutations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from for_ray.model.matching import match


def best_sum(probability: torch.Tensor, columns: list[int]) -> float:
    """The largest sum of probabilities over all ways to give labels slots of their own."""
    num_slots, few = len(probability), min(len(probability), len(columns))
    return max(
        sum(float(probability[slot, column]) for slot, column in zip(slots, chosen, strict=True))
        for slots in itertools.permutations(range(num_slots), few)
        for chosen in itertools.combinations(columns, few)
    )


@pytest.mark.parametrize(("num_slots", "num_labels"), [(1, 1), (4, 2), (4, 4), (3, 5), (5, 1), (2, 4)])
def test_the_sum_is_the_best_of_all_assignments(num_slots: int, num_labels: int) -> None:
    generator = torch.Generator().manual_seed(num_slots * 10 + num_labels)
    probability = torch.rand((6, num_slots, num_labels), generator=generator)
    labels = torch.randint(0, 9, (6, num_labels), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -1

    pairs = match(probability, labels)

    for image in range(6):
        mine = pairs.images == image
        slots, columns = pairs.slots[mine].tolist(), pairs.columns[mine].tolist()
        present = [column for column in range(num_labels) if labels[image, column] >= 0]
        assert len(slots) == min(num_slots, len(present))
        assert len(set(slots)) == len(slots)
        assert len(set(columns)) == len(columns)
        assert set(columns) <= set(present)
        found = sum(float(probability[image, s, c]) for s, c in zip(slots, columns, strict=True))
        assert found == pytest.approx(best_sum(probability[image], present) if present else 0.0)


def test_a_batch_equals_its_images_one_by_one() -> None:
    generator = torch.Generator().manual_seed(3)
    probability = torch.rand((5, 4, 3), generator=generator)
    labels = torch.tensor([[1, 2, 3], [4, -1, 5], [-1, -1, -1], [7, -1, -1], [0, 1, 2]])
    whole = match(probability, labels)
    for image in range(5):
        alone = match(probability[image : image + 1], labels[image : image + 1])
        mine = whole.images == image
        assert whole.slots[mine].tolist() == alone.slots.tolist()
        assert whole.columns[mine].tolist() == alone.columns.tolist()


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 3, 0)])
def test_nothing_to_match_gives_no_pairs(shape: tuple[int, int, int]) -> None:
    pairs = match(torch.zeros(shape), torch.zeros((shape[0], shape[2]), dtype=torch.int64))
    assert [len(part) for part in pairs] == [0, 0, 0]
    assert all(part.dtype == torch.int64 for part in pairs)


def test_what_stands_beside_the_labels_does_not_matter() -> None:
    probability = torch.tensor([[[0.1, np.nan], [0.9, np.inf]]])
    pairs = match(probability, torch.tensor([[3, -1]]))
    assert (pairs.slots.tolist(), pairs.columns.tolist()) == ([1], [0])


def test_a_probability_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        match(torch.tensor([[[np.nan]]]), torch.tensor([[0]]))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        match(torch.zeros(2, 3, 4), torch.zeros((2, 5), dtype=torch.int64))
