"""The losses of the second paper against closed forms, plain loops and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from for_ray.model.margin_loss import ArcMargin, add_margin, arc_margin, info_nce, mc_arc_margin

S, M = 7.0, 0.3


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at_angles(*angles: float) -> torch.Tensor:
    """Unit vectors of the plane."""
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.float64)


def test_the_margin_is_added_to_the_angle_of_ones_own_only():
    angles = torch.linspace(0.01, math.pi - M - 0.01, 50, dtype=torch.float64)
    own = torch.ones(50, dtype=torch.bool)
    torch.testing.assert_close(add_margin(angles.cos(), own, margin=M), (angles + M).cos())
    torch.testing.assert_close(add_margin(angles.cos(), ~own, margin=M), angles.cos())


def test_past_the_turn_the_value_goes_on_falling():
    angles = torch.linspace(math.pi - M + 0.001, math.pi, 50, dtype=torch.float64)
    own = torch.ones(50, dtype=torch.bool)
    expected = angles.cos() - M * math.sin(math.pi - M)
    found = add_margin(angles.cos(), own, margin=M)
    torch.testing.assert_close(found, expected)
    assert (found.diff() < 0).all()


@pytest.mark.parametrize("margin", [-0.1, math.pi])
def test_a_margin_out_of_range_is_refused(margin):
    with pytest.raises(ValueError, match="below π"):
        add_margin(torch.zeros(1), torch.ones(1, dtype=torch.bool), margin=margin)


def test_arc_margin_of_two_classes_is_its_closed_form():
    """An image at 40°, proxies at 10° and 100°; lengths do not count."""
    image, proxies = at_angles(math.radians(40)), at_angles(math.radians(10), math.radians(100))
    own, other = S * math.cos(math.radians(30) + M), S * math.cos(math.radians(60))
    found = arc_margin(5 * image, 3 * proxies, torch.tensor([0]), scale=S, margin=M)
    assert found.item() == pytest.approx(math.log1p(math.exp(other - own)), rel=1e-12)


def test_without_a_margin_it_is_the_scaled_softmax():
    vectors, proxies, labels = randn(6, 5), randn(4, 5, seed=1), torch.tensor([0, 3, 2, 1, 0, 3])
    cosines = functional.normalize(vectors, dim=1) @ functional.normalize(proxies, dim=1).T
    expected = functional.cross_entropy(S * cosines, labels, reduction="none")
    torch.testing.assert_close(arc_margin(vectors, proxies, labels, scale=S, margin=0.0), expected)


def test_a_margin_makes_the_loss_larger():
    vectors, proxies, labels = randn(6, 5), randn(4, 5, seed=1), torch.tensor([0, 3, 2, 1, 0, 3])
    plain, harder = (arc_margin(vectors, proxies, labels, scale=S, margin=m) for m in (0.0, M))
    assert (harder > plain).all()


def test_one_caption_an_image_is_arc_margin_with_texts_for_proxies():
    vectors, texts, labels = randn(6, 5), randn(4, 5, seed=1), torch.tensor([0, 3, 2, 1, 0, 3])
    is_own = functional.one_hot(labels, 4).bool()
    found = mc_arc_margin(vectors, texts, is_own, scale=S, margin=M)
    torch.testing.assert_close(found.values, arc_margin(vectors, texts, labels, scale=S, margin=M))
    assert found.has_captions.all()


def test_several_captions_are_the_mean_over_them_by_a_plain_loop():
    vectors, texts = randn(3, 5), randn(6, 5, seed=1)
    own = [{0, 2, 5}, {1}, {2, 3}]
    is_own = torch.tensor([[c in each for c in range(6)] for each in own])
    expected = []
    for vector, each in zip(vectors, own, strict=True):
        logits = []
        for c, text in enumerate(texts):
            angle = math.acos(float(vector @ text / vector.norm() / text.norm()))
            past = angle >= math.pi - M
            harder = math.cos(angle) - M * math.sin(math.pi - M) if past else math.cos(angle + M)
            logits.append(S * (harder if c in each else math.cos(angle)))
        total = math.log(sum(math.exp(logit) for logit in logits))
        expected.append(sum(total - logits[c] for c in each) / len(each))
    found = mc_arc_margin(vectors, texts, is_own, scale=S, margin=M).values
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_an_image_without_captions_contributes_nothing():
    vectors, texts = randn(2, 5).requires_grad_(), randn(3, 5, seed=1)
    is_own = torch.tensor([[True, False, True], [False, False, False]])
    found = mc_arc_margin(vectors, texts, is_own, scale=S, margin=M)
    assert found.has_captions.tolist() == [True, False]
    found.values.sum().backward()
    assert found.values[1] == 0
    assert (vectors.grad[1] == 0).all()
    assert (vectors.grad[0] != 0).any()


def test_a_batch_without_any_caption_has_a_gradient_of_zero():
    vectors = randn(2, 5).requires_grad_()
    found = mc_arc_margin(vectors, torch.empty(0, 5).double(), torch.empty(2, 0, dtype=torch.bool))
    found.values.sum().backward()
    assert not found.has_captions.any()
    assert (vectors.grad == 0).all()


def test_info_nce_of_two_pairs_is_its_closed_form():
    images, texts = at_angles(0.0, 1.0), at_angles(0.2, 1.5)
    cosine = [[math.cos(i - t) for t in (0.2, 1.5)] for i in (0.0, 1.0)]
    first = math.log1p(math.exp(S * (cosine[0][1] - cosine[0][0])))  # image 0 among the texts
    second = math.log1p(math.exp(S * (cosine[1][0] - cosine[0][0])))  # text 0 among the images
    found = info_nce(2 * images, 3 * texts, scale=S)
    assert found[0].item() == pytest.approx((first + second) / 2, rel=1e-12)


@pytest.mark.parametrize("margin", [0.0, M, 1.5])
def test_the_gradients_are_those_of_finite_differences(margin):
    vectors, proxies = randn(4, 3).requires_grad_(), randn(5, 3, seed=1).requires_grad_()
    labels, is_own = torch.tensor([0, 4, 2, 2]), randn(4, 5, seed=2) > 0

    def arc(vectors, proxies):
        return arc_margin(vectors, proxies, labels, scale=S, margin=margin)

    def captioned(vectors, proxies):
        return mc_arc_margin(vectors, proxies, is_own, scale=S, margin=margin).values

    def pairs(vectors, proxies):
        return info_nce(vectors, proxies[:4], scale=S)

    for loss in (arc, captioned, pairs):
        assert torch.autograd.gradcheck(loss, (vectors, proxies))


def test_a_vector_on_its_proxy_has_a_finite_gradient():
    vectors = at_angles(0.0).requires_grad_()
    arc_margin(vectors, at_angles(0.0, 2.0), torch.tensor([0]), scale=S, margin=M).sum().backward()
    assert vectors.grad.isfinite().all()


def test_proxies_depend_on_the_seed_alone_and_are_trained():
    first, same, other = (ArcMargin(4, 8, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.proxies, same.proxies)
    assert not torch.equal(first.proxies, other.proxies)
    assert first.proxies.abs().max() <= math.sqrt(6 / 12)  # Xavier's bound
    first(randn(2, 8).float(), torch.tensor([1, 2])).sum().backward()
    assert (first.proxies.grad != 0).any()
