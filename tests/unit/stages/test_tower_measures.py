"""What an epoch of a tuning is measured by: against definitions, and whatever is held at a time."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from for_ray.datasets.labelled import Ragged
from for_ray.evaluation import similarity
from for_ray.model.trainer import HaltedError
from for_ray.stages import tower_measures
from for_ray.stages.shared_towers import Embedded
from for_ray.stages.tower_measures import Totals, TowerMeasures, caption_totals, class_totals
from for_ray.stages.tower_val import TowerVal

B, V, D = 23, 5, 8

WORLDS = [1, 2, 3, 30]
"""Numbers of workers; of 30 some ask nothing."""


def unit(rng: np.random.Generator, rows: int) -> np.ndarray:
    vectors = rng.standard_normal((rows, D))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(params=[1 << 25, 40, 1])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many cosines are held at a time."""
    monkeypatch.setattr(tower_measures, "SCORES_AT_ONCE", request.param)
    monkeypatch.setattr(similarity, "SCORES_AT_ONCE", request.param)
    return request.param


def measures_of(shares: list[Totals]) -> dict[str, float]:
    """What all workers found together."""
    return {
        name: sum(share[name][0] for share in shares) / sum(share[name][1] for share in shares)
        for name in shares[0]
    }


@pytest.mark.parametrize("world", WORLDS)
def test_images_find_their_class_and_its_name(held, world):
    rng = np.random.default_rng(0)
    images, names = unit(rng, B).astype(np.float16), unit(rng, V).astype(np.float16)
    classes = rng.integers(0, V, B)
    precisions, firsts = [], []
    for row in range(B):
        cosines = images.astype(np.float32) @ images[row].astype(np.float32)
        order = [int(each) for each in np.argsort(-cosines, kind="stable") if each != row]
        hits = [classes[each] == classes[row] for each in order]
        precisions.append(np.mean([np.mean(hits[: rank + 1]) for rank, hit in enumerate(hits) if hit]))
        firsts.append(hits[0])
    named = (images.astype(np.float32) @ names.T.astype(np.float32)).argmax(axis=1) == classes
    shares = [class_totals(images, names, classes, rank=rank, world=world) for rank in range(world)]
    assert measures_of(shares) == pytest.approx(
        {
            "image-to-image mAP": np.mean(precisions),
            "image-to-image R@1": np.mean(firsts),
            "zero-shot accuracy": named.mean(),
        }
    )


@pytest.mark.parametrize("world", WORLDS)
def test_captions_find_their_images(held, world):
    """Some captions have several images, some none: these are no queries."""
    rng = np.random.default_rng(1)
    images, captions = unit(rng, B).astype(np.float16), unit(rng, 40).astype(np.float16)
    of_image = Ragged.of([rng.choice(30, 1 + row % 3, replace=False) for row in range(B)])
    ranks = []
    for caption in np.unique(of_image.values):
        order = np.argsort(-(images.astype(np.float32) @ captions[caption].astype(np.float32)), kind="stable")
        own = [row for row in range(B) if caption in of_image.row(row)]
        ranks.append(int(np.isin(order, own).argmax()))
    assert 20 < len(ranks) < 40
    shares = [caption_totals(images, captions, of_image, rank=rank, world=world) for rank in range(world)]
    found = measures_of(shares)
    assert found == pytest.approx({f"text-to-image R@{k}": np.mean(np.array(ranks) < k) for k in (1, 5, 10)})


def test_what_is_alike_is_found():
    images = np.eye(D, dtype=np.float16)[[0, 0, 1, 1, 2]]
    found = class_totals(images, np.eye(D, dtype=np.float16), np.array([0, 0, 1, 1, 2]))
    assert list(found.values()) == [(4, 4), (4, 4), (5, 5)]  # one is alone in its class
    captions = np.eye(D, dtype=np.float16)[:3]
    found = caption_totals(images, captions, Ragged.of([[0], [0], [1], [1], [2]]))
    assert list(found.values()) == [(3, 3)] * 3


class Towers:
    """Vectors that are known, and as many workers that find the same."""

    rank, world = 0, 1

    def __init__(self, images: np.ndarray, texts: np.ndarray) -> None:
        self._images, self._texts = images, texts

    def embed_images(self, images: object, *, goes_on: bool) -> Embedded:
        return Embedded(torch.from_numpy(self._images), torch.ones(len(self._images), dtype=torch.bool))

    def embed_names(self, names: object) -> np.ndarray:
        return self._texts

    embed_captions = embed_names

    def sum(self, mine: list[float]) -> list[float]:
        return [2 * value for value in mine]


def measure(images: np.ndarray, texts: np.ndarray, *, are_captions: bool) -> dict[str, float]:
    uris = pa.array([f"/{row}.jpg" for row in range(4)])
    val = TowerVal("the set", uris, ("a dog", "a cat"), Ragged.of([[0], [0], [1], [1]]))
    towers = Towers(images, texts)
    measures = TowerMeasures(val, towers, are_captions=are_captions, max_bad_fraction=0.5)  # type: ignore[arg-type]
    return measures.measure()


@pytest.mark.parametrize("are_captions", [False, True])
def test_the_means_are_over_the_queries_of_all_workers(are_captions):
    alike = np.eye(D, dtype=np.float16)
    found = measure(alike[[0, 0, 1, 1]], alike[:2], are_captions=are_captions)
    assert list(found.values()) == [1, 1, 1]


@pytest.mark.parametrize(("are_captions", "what"), [(False, "class names"), (True, "captions")])
def test_texts_without_a_finite_vector_are_no_perfect_measure(are_captions, what):
    images, texts = np.eye(D, dtype=np.float16)[[0, 0, 1, 1]], np.eye(D, dtype=np.float16)[:2]
    texts[1, 3] = np.nan
    message = f"^--val: 1 of 2 {what} of the set have no finite vector, such as 'a cat': take another"
    with pytest.raises(HaltedError, match=message):
        measure(images, texts, are_captions=are_captions)


def test_images_without_a_finite_vector_are_left_out_and_told():
    images, texts = np.eye(D, dtype=np.float16)[[0, 0, 1, 1]], np.eye(D, dtype=np.float16)[:2]
    images[3, 0] = np.inf
    assert list(measure(images, texts, are_captions=False).values()) == [1, 1, 1]
    images[0, 0] = np.nan
    message = "no class of the set has two images .*; 2 of 4 images of the set cannot be read, or have no "
    with pytest.raises(HaltedError, match=message):
        measure(images, texts, are_captions=False)
    images[1, 0] = np.nan
    with pytest.raises(
        HaltedError, match=r"^--val: 3 of 4 images of the set cannot be read, or have no .* 50%"
    ):
        measure(images, texts, are_captions=True)
