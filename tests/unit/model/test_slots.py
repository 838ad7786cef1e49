"""The rules of benchmarks/slots.py: which slots are kept, and what is chosen by them."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import normalize

from benchmarks.slots import choose, claimed_slots, farthest_order, highest, merged_slots


def test_the_slots_that_one_name_claims_against_the_others_are_kept() -> None:
    """Two names on the axes; between them a slot is claimed by neither."""
    names = torch.eye(2)
    between, near, on = (
        normalize(torch.tensor(pair), dim=0) for pair in ([1.0, 1.0], [2.0, 1.0], [0.0, 1.0])
    )
    vectors = torch.stack([between, near, on])[None]
    # Highest less mean cosine: 0, (2 - 1.5) / √5 = 0.22 and 0.5.
    assert claimed_slots(vectors, names, 1).tolist() == [[False, False, True]]
    assert claimed_slots(vectors, names, 2).tolist() == [[False, True, True]]


def test_a_batch_is_its_images_one_by_one_and_the_order_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = normalize(torch.randn(20, 9, 6, generator=generator), dim=-1)
    names = normalize(torch.randn(30, 6, generator=generator), dim=-1)
    keep = claimed_slots(vectors, names, 4)
    assert bool((keep.sum(dim=1) == 4).all())
    assert torch.equal(keep, torch.cat([claimed_slots(image[None], names, 4) for image in vectors]))
    order = torch.randperm(9, generator=generator)
    assert torch.equal(claimed_slots(vectors[:, order], names.flip(0), 4), keep[:, order])


def test_of_equal_slots_the_first_are_kept_and_few_slots_are_all_kept() -> None:
    names = torch.eye(3)
    equal = normalize(torch.ones(2, 4, 3), dim=-1)
    assert claimed_slots(equal, names, 2).tolist() == [[True, True, False, False]] * 2
    assert claimed_slots(equal[:, :1], names, 5).tolist() == [[True], [True]]
    assert claimed_slots(equal, names[:1], 1).tolist() == [[True, False, False, False]] * 2


def test_the_slot_least_like_those_before_is_taken_next() -> None:
    """Against the rule written as a loop over images and slots; of equal slots the later wait."""
    generator = torch.Generator().manual_seed(4)
    vectors = normalize(torch.randn(20, 7, 4, generator=generator), dim=-1)
    for image, order in zip(vectors, farthest_order(vectors).tolist(), strict=True):
        taken = [0]
        while len(taken) < 7:
            rest = [slot for slot in range(7) if slot not in taken]
            taken.append(min(rest, key=lambda slot: float((image[taken] @ image[slot]).max())))
        assert order == taken
    assert farthest_order(torch.eye(2)[torch.tensor([[0, 0, 1]])]).tolist() == [[0, 2, 1]]
    assert farthest_order(vectors[:, :1]).tolist() == [[0]] * 20


def test_a_kept_slot_becomes_the_mean_of_what_is_most_like_it() -> None:
    vectors = normalize(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 3.0]]]), dim=-1)
    merged = merged_slots(vectors, torch.tensor([[True, True, False, False]]))
    # (1, 1) is as like the one as the other and goes to the first.
    assert torch.allclose(merged[0, 0], normalize(vectors[0, 0] + vectors[0, 2], dim=0))
    assert torch.allclose(merged[0, 1], normalize(vectors[0, 1] + vectors[0, 3], dim=0))
    assert torch.allclose(merged_slots(vectors, torch.ones(1, 4, dtype=torch.bool)), vectors)


def test_of_equal_scores_the_first_are_highest() -> None:
    assert highest(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), 2).tolist() == [[False, True, True, False]]
    assert highest(torch.tensor([[1.0, 3.0]]), 5).tolist() == [[True, True]]


def test_the_fewest_vectors_within_the_allowed_loss_are_chosen() -> None:
    def line(rule: str, vectors: float, base: float, novel: float) -> dict[str, Any]:
        means = {"base": base, "novel": novel, "all": (base + novel) / 2}
        return {"slots": 8, "rule": rule, "setting": vectors, "vectors_per_image": vectors, **means}

    whole = line("all", 8.0, 0.5, 0.4)
    lines = [whole, line("cosine", 7.0, 0.495, 0.395), line("cosine", 6.0, 0.6, 0.3949)]
    lines += [line("claimed", 3.0, 0.5, 0.4), line("claimed", 4.0, 0.5, 0.4)]
    assert choose(lines) == [whole, lines[1], lines[3]]
