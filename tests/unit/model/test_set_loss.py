"""The set-prediction loss against closed forms, a plain loop, and finite differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional

from for_ray.model.set_loss import SetLoss

SCALE = 7.0


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(shape, generator=generator, dtype=dtype), dim=-1)


def by_hand(vectors: torch.Tensor, labels: torch.Tensor, loss: SetLoss) -> tuple[float, float]:
    """Loss and weight by trying every assignment of every image."""
    total = weight = 0.0
    for image, row in zip(vectors, labels, strict=True):
        logits = SCALE * image @ loss.text.T
        if loss.null_logit is not None:
            logits = torch.cat([logits, loss.null_logit.expand(len(image), 1)], dim=1)
        log_p, wanted = logits.detach().log_softmax(dim=1), [int(label) for label in row if label >= 0]
        few = min(len(image), len(wanted))
        pairs = max(
            (
                list(zip(slots, chosen, strict=True))
                for slots in itertools.permutations(range(len(image)), few)
                for chosen in itertools.combinations(wanted, few)
            ),
            key=lambda pairs: sum(math.exp(log_p[slot, label]) for slot, label in pairs),
        )
        total -= sum(float(log_p[slot, label]) for slot, label in pairs)
        weight += few
        if loss.null_logit is not None:
            free = set(range(len(image))) - {slot for slot, _ in pairs}
            total -= loss.null_weight * sum(float(log_p[slot, -1]) for slot in free)
            weight += loss.null_weight * len(free)
    return total, weight


@pytest.mark.parametrize("null_weight", [0.0, 0.1])
def test_it_is_what_a_plain_loop_finds(null_weight: float) -> None:
    vectors, text = unit(5, 3, 8), unit(6, 8, seed=1)
    labels = torch.tensor([[0, 2], [5, -1], [-1, -1], [1, 4], [3, 0]])
    loss = SetLoss(text, logit_scale=SCALE, null_weight=null_weight)
    if loss.null_logit is not None:
        loss.null_logit.data.fill_(0.8)
    sums = loss(vectors, labels)
    total, weight = by_hand(vectors, labels, loss)
    assert float(sums.loss.detach()) == pytest.approx(total, rel=1e-5)
    assert float(sums.weight.detach()) == pytest.approx(weight)
    assert (int(sums.num_matched), int(sums.num_dropped)) == (7, 0)


def test_no_labels_and_no_null_is_no_loss() -> None:
    vectors = unit(2, 3, 8).requires_grad_()
    sums = SetLoss(unit(4, 8), logit_scale=SCALE, null_weight=0)(vectors, torch.full((2, 2), -1))
    assert (float(sums.loss), float(sums.weight)) == (0, 0)
    sums.loss.backward()
    assert vectors.grad is not None
    assert not vectors.grad.any()


def test_no_labels_sends_every_slot_to_null() -> None:
    text = unit(4, 8)
    vectors = unit(1, 3, 8, seed=2)
    sums = SetLoss(text, logit_scale=SCALE, null_weight=0.5)(vectors, torch.empty((1, 0), dtype=torch.int64))
    exps = (SCALE * vectors[0] @ text.T).exp().sum(dim=1)
    assert float(sums.loss.detach()) == pytest.approx(float(0.5 * (1 + exps).log().sum()), rel=1e-5)
    assert float(sums.weight.detach()) == pytest.approx(1.5)


def test_one_slot_and_one_label_is_cross_entropy() -> None:
    vectors, text = unit(3, 1, 8), unit(5, 8, seed=1)
    labels = torch.tensor([[4], [0], [2]])
    sums = SetLoss(text, logit_scale=SCALE, null_weight=0)(vectors, labels)
    expected = functional.cross_entropy(SCALE * vectors[:, 0] @ text.T, labels[:, 0], reduction="sum")
    assert float(sums.loss.detach()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("null_weight", "expected"), [(0.0, math.log(5)), (1.0, math.log(6))])
def test_uniform_logits_cost_the_logarithm_of_the_categories(null_weight: float, expected: float) -> None:
    vectors, text = unit(1, 4, 8).expand(2, 4, 8), torch.zeros(5, 8)
    sums = SetLoss(text, logit_scale=SCALE, null_weight=null_weight)(vectors, torch.tensor([[0, 1], [3, -1]]))
    assert float(sums.loss / sums.weight) == pytest.approx(expected)


def test_more_labels_than_slots_are_counted() -> None:
    sums = SetLoss(unit(6, 8), logit_scale=SCALE, null_weight=0)(unit(1, 2, 8), torch.tensor([[0, 1, 2, 3]]))
    assert (int(sums.num_matched), int(sums.num_dropped), float(sums.weight)) == (2, 2, 2)


def test_only_candidates_take_part() -> None:
    vectors, text, labels = unit(2, 3, 8), unit(6, 8, seed=1), torch.tensor([[1], [4]])
    candidates = torch.zeros((2, 6), dtype=torch.bool)
    candidates[:, [1, 4, 5]] = True
    sums = SetLoss(text, logit_scale=SCALE, null_weight=0)(vectors, labels, candidates=candidates)
    small = SetLoss(text[[1, 4, 5]], logit_scale=SCALE, null_weight=0)(vectors, torch.tensor([[0], [1]]))
    assert float(sums.loss.detach()) == pytest.approx(float(small.loss), rel=1e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    text = unit(5, 6, seed=1, dtype=torch.float64)
    loss = SetLoss(text, logit_scale=SCALE, null_weight=0.3).double()
    labels = torch.tensor([[0, 3], [2, -1]])
    vectors = unit(2, 3, 6, dtype=torch.float64).requires_grad_()
    assert loss.null_logit is not None

    def value(vectors: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        sums = loss(vectors, labels)
        return sums.loss / sums.weight

    assert torch.autograd.gradcheck(value, (vectors, loss.null_logit))


def test_the_order_of_labels_and_slots_does_not_matter() -> None:
    vectors, text = unit(2, 4, 8), unit(6, 8, seed=1)
    loss = SetLoss(text, logit_scale=SCALE, null_weight=0.1)
    one = loss(vectors, torch.tensor([[0, 2, 5], [1, -1, 3]]))
    other = loss(vectors.flip(1), torch.tensor([[5, 0, 2], [3, 1, -1]]))
    assert float(one.loss) == pytest.approx(float(other.loss), rel=1e-5)


def test_a_label_outside_the_categories_is_refused() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        SetLoss(unit(3, 8), logit_scale=SCALE, null_weight=0)(unit(1, 2, 8), torch.tensor([[3]]))


def test_nan_is_refused() -> None:
    vectors = torch.full((1, 2, 8), torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        SetLoss(unit(3, 8), logit_scale=SCALE, null_weight=0)(vectors, torch.tensor([[1]]))


@pytest.mark.parametrize(("vectors", "labels"), [((2, 3, 7), (2, 1)), ((2, 3, 8), (3, 1))])
def test_shapes_that_do_not_fit_are_refused(vectors: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SetLoss(unit(3, 8), logit_scale=SCALE, null_weight=0)(
            unit(*vectors), torch.zeros(labels, dtype=torch.int64)
        )


def test_of_more_labels_than_slots_the_most_probable_are_learnt_whatever_the_slots_say() -> None:
    """The slots are the vectors of the last two labels, yet the first two are given to them."""
    text = torch.eye(4)
    vectors, labels = text[None, 2:], torch.tensor([[0, 1, 2, 3]])
    chosen = SetLoss(text, logit_scale=SCALE, null_weight=0.0)(vectors, labels)
    ranked = SetLoss(text, logit_scale=SCALE, null_weight=0.0, is_ranked=True)(vectors, labels)
    first = SetLoss(text, logit_scale=SCALE, null_weight=0.0)(vectors, labels[:, :2])
    torch.testing.assert_close(ranked.loss, first.loss)
    assert float(ranked.loss) == pytest.approx(float(chosen.loss) + 2 * SCALE)
    assert (int(ranked.num_matched), int(ranked.num_dropped)) == (2, 2)
