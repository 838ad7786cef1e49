"""Pseudo-labels against a plain loop over images, slots and categories."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from for_ray.model import pseudo_labels
from for_ray.model.pseudo_labels import category_probabilities, label_images


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return functional.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def plain(vectors: torch.Tensor, text: torch.Tensor, scale: float) -> np.ndarray:
    out = np.zeros((len(vectors), len(text)))
    for image, slots in enumerate(vectors.double().numpy()):
        for slot in slots:
            exps = np.exp(scale * text.double().numpy() @ slot)
            out[image] = np.maximum(out[image], exps / exps.sum())
    return out


def test_probabilities_are_those_of_a_plain_loop() -> None:
    vectors, text = unit(4, 3, 8), unit(9, 8, seed=1)
    found = category_probabilities(vectors, text, logit_scale=11.0)
    expected = plain(vectors, text, 11.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_large_batches_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, text = unit(7, 3, 8), unit(9, 8, seed=1)
    whole = category_probabilities(vectors, text, logit_scale=11.0)
    monkeypatch.setattr(pseudo_labels, "MOST_LOGITS", 60)  # two images of 3 × 9 similarities
    torch.testing.assert_close(category_probabilities(vectors, text, logit_scale=11.0), whole)


def test_labels_are_above_the_threshold_and_the_most_probable_come_first() -> None:
    vectors, text = unit(6, 4, 8), unit(9, 8, seed=1)
    probabilities = category_probabilities(vectors, text, logit_scale=11.0)
    found = label_images(vectors, text, logit_scale=11.0, threshold=0.6, most=3)
    for row, labels, values in zip(probabilities, *found, strict=True):
        above = sorted(((float(p), c) for c, p in enumerate(row) if p > 0.6), reverse=True)[:3]
        kept = [int(label) for label in labels if label >= 0]
        assert kept == [category for _, category in above]
        assert values[: len(kept)].tolist() == pytest.approx([p for p, _ in above])
        assert labels[len(kept) :].tolist() == [-1] * (3 - len(kept))
        assert not values[len(kept) :].any()
    assert any((found.labels < 0).any(dim=1)), "the case of fewer labels than asked for has to come"


def test_bare_cosines_over_a_large_vocabulary_cannot_pass_the_papers_threshold() -> None:
    text = unit(21843, 16, seed=2)
    found = label_images(text[None, :3], text, logit_scale=1.0, threshold=5e-4, most=50)
    assert (found.labels == -1).all()
    scaled = label_images(text[None, :3], text, logit_scale=100.0, threshold=5e-4, most=50)
    assert {0, 1, 2} <= set(scaled.labels[0].tolist())


def test_no_images_and_small_vocabularies() -> None:
    empty = label_images(unit(2, 3, 8)[:0], unit(4, 8), logit_scale=1.0, threshold=0.0, most=50)
    assert (tuple(empty.labels.shape), tuple(empty.probabilities.shape)) == ((0, 4), (0, 4))


@pytest.mark.parametrize(
    ("vectors", "text", "most"), [((2, 8), (4, 8), 1), ((2, 3, 7), (4, 8), 1), ((2, 3, 8), (4, 8), 0)]
)
def test_what_does_not_fit_is_refused(vectors: tuple[int, ...], text: tuple[int, ...], most: int) -> None:
    with pytest.raises(ValueError, match=r"expected|at least"):
        label_images(unit(*vectors), unit(*text), logit_scale=1.0, threshold=0.1, most=most)
