"""What an epoch of a tuning is measured by: against definitions, and whatever is held at a time."""

from __future__ import annotations

import numpy as np
import pytest

from for_ray.datasets.labelled import Ragged
from for_ray.evaluation import similarity
from for_ray.stages import tower_measures
from for_ray.stages.tower_measures import caption_measures, class_measures

B, V, D = 23, 5, 8


def unit(rng: np.random.Generator, rows: int) -> np.ndarray:
    vectors = rng.standard_normal((rows, D))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(params=[1 << 25, 40, 1])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many cosines are held at a time."""
    monkeypatch.setattr(tower_measures, "SCORES_AT_ONCE", request.param)
    monkeypatch.setattr(similarity, "SCORES_AT_ONCE", request.param)
    return request.param


def test_images_find_their_class_and_its_name(held):
    rng = np.random.default_rng(0)
    images, names = unit(rng, B).astype(np.float16), unit(rng, V).astype(np.float32)
    classes = rng.integers(0, V, B)
    precisions, firsts = [], []
    for row in range(B):
        cosines = images.astype(np.float32) @ images[row].astype(np.float32)
        order = [int(each) for each in np.argsort(-cosines, kind="stable") if each != row]
        hits = [classes[each] == classes[row] for each in order]
        precisions.append(np.mean([np.mean(hits[: rank + 1]) for rank, hit in enumerate(hits) if hit]))
        firsts.append(hits[0])
    named = (images.astype(np.float32) @ names.T).argmax(axis=1) == classes
    assert class_measures(images, names, classes) == pytest.approx(
        {
            "image-to-image mAP": np.mean(precisions),
            "image-to-image R@1": np.mean(firsts),
            "zero-shot accuracy": named.mean(),
        }
    )


def test_captions_find_their_images(held):
    """Some captions have several images, some none: these are no queries."""
    rng = np.random.default_rng(1)
    images, captions = unit(rng, B).astype(np.float16), unit(rng, 40).astype(np.float32)
    of_image = Ragged.of([rng.choice(30, 1 + row % 3, replace=False) for row in range(B)])
    ranks = []
    for caption in np.unique(of_image.values):
        order = np.argsort(-(images.astype(np.float32) @ captions[caption]), kind="stable")
        own = [row for row in range(B) if caption in of_image.row(row)]
        ranks.append(int(np.isin(order, own).argmax()))
    assert 20 < len(ranks) < 40
    found = caption_measures(images, captions, of_image)
    assert found == pytest.approx({f"text-to-image R@{k}": np.mean(np.array(ranks) < k) for k in (1, 5, 10)})


def test_what_is_alike_is_found():
    images = np.eye(D, dtype=np.float16)[[0, 0, 1, 1, 2]]
    found = class_measures(images, np.eye(D, dtype=np.float32), np.array([0, 0, 1, 1, 2]))
    assert list(found.values()) == [1, 1, 1]
    captions = np.eye(D, dtype=np.float32)[:3]
    found = caption_measures(images, captions, Ragged.of([[0], [0], [1], [1], [2]]))
    assert list(found.values()) == [1, 1, 1]
