"""Several terms at once: against all assignments tried one by one, and through real segments."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from for_ray.index import conjunction
from for_ray.index.conjunction import ImageObjects, assign_slots, bottleneck, search_clauses
from for_ray.index.search import open_segments
from for_ray.index.table import open_table
from for_ray.model.bundle import Bundle
from for_ray.retrieval.rows import take_objects
from for_ray.schema import MAX_SLOTS
from tests.planted import Planted, PlantedIndex

DIM = 16


def tried_one_by_one(scores: NDArray[np.float32]) -> float:
    """The bottleneck of one image [N, p], by all permutations."""
    num_places, num_terms = scores.shape
    chosen = itertools.permutations(range(num_places), num_terms)
    return max(
        (min(scores[slot, term] for term, slot in enumerate(each)) for each in chosen), default=-np.inf
    )


@pytest.mark.parametrize(
    ("num_places", "num_terms"), [(1, 1), (5, 1), (2, 2), (5, 2), (4, 4), (6, 3), (2, 3)]
)
def test_bottleneck_is_that_of_all_assignments(num_places: int, num_terms: int) -> None:
    rng = np.random.default_rng(num_places * 10 + num_terms)
    scores = rng.integers(0, 6, (200, num_places, num_terms)).astype(np.float32)  # many ties
    assert bottleneck(scores).tolist() == [tried_one_by_one(each) for each in scores]


def test_no_images_and_no_places() -> None:
    assert bottleneck(np.empty((0, 3, 2), np.float32)).shape == (0,)
    assert bottleneck(np.empty((2, 0, 1), np.float32)).tolist() == [-np.inf, -np.inf]


def test_slots_of_one_image() -> None:
    cosines = np.array([[0.9, 0.8], [0.85, 0.1], [0.2, 0.7]], np.float32)
    boxes = np.array([[0, 0, 9, 9], [1, 1, 5, 5], [2, 2, 6, 6]], np.uint8)
    assert assign_slots(cosines, boxes).tolist() == [1, 0]  # weakest 0.8, where 0 and 2 have 0.7
    same_box = boxes[[0, 0, 2]]
    assert assign_slots(cosines, same_box).tolist() == [0, 2]  # 0 and 1 are one place
    assert assign_slots(cosines[:, [0, 0]], boxes).tolist() in ([0, 1], [1, 0])


@pytest.mark.parametrize("seed", range(5))
def test_slots_reach_the_bottleneck(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cosines = rng.random((7, 3), np.float32)
    boxes = rng.integers(0, 255, (7, 4), np.uint8)
    slots = assign_slots(cosines, boxes)
    assert len(set(slots.tolist())) == 3
    assert cosines[slots, np.arange(3)].min() == bottleneck(cosines[None])[0]


def random_units(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    vectors = rng.normal(size=(count, DIM))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


class Indexed:
    """120 images of up to five vectors in two segments, and the answers of a comparison with all of them."""

    def __init__(self, planted: PlantedIndex, codec: str) -> None:
        rng = np.random.default_rng(8)
        images = []
        for number in range(120):
            count = int(rng.integers(0, 6))
            low = rng.integers(0, 3, (count, 2)) / 10  # so few boxes that some are equal
            boxes = np.concatenate([low, low + 0.5], axis=1)
            images.append(Planted(f"{number}", random_units(rng, count), boxes.tolist()))
        planted.add(images[:70], codec=codec)
        planted.add(images[70:])
        snapshot = planted.publish(nprobe=1)
        self.table = open_table(planted.images_uri)
        self.segments = open_segments(planted.layout, planted.bundle.fingerprint, snapshot.segments, nprobe=1)
        self.terms = random_units(rng, 3)
        self.all = take_objects(self.table, np.arange(120))
        self.rows = {int(image_id): row for row, image_id in enumerate(self.all.image_ids)}

    def objects(self, image_ids: NDArray[np.int64]) -> ImageObjects:
        return take_objects(self.table, image_ids)

    def exact(
        self, clauses: list[tuple[list[int], list[int]]], limits: NDArray[np.float64]
    ) -> list[tuple[int, float]]:
        """All answers, one image after the other."""
        found = []
        for image_id, row in self.rows.items():
            start, end = self.all.offsets[row : row + 2]
            vectors, boxes = self.all.vectors[start:end].astype(np.float64), self.all.boxes[start:end]
            cosines = (vectors @ self.terms.astype(np.float64).T).astype(np.float32)
            kinds = sorted({tuple(box) for box in boxes.tolist()})
            places = [cosines[[tuple(box) == kind for box in boxes.tolist()]].max(axis=0) for kind in kinds]
            scores = [
                tried_one_by_one(np.array(places)[:, wanted])
                for wanted, unwanted in clauses
                if places and all(np.max(places, axis=0)[term] <= limits[term] for term in unwanted)
            ]
            if scores and np.isfinite(max(scores)):
                found.append((image_id, float(max(scores))))
        return sorted(found, key=lambda each: (-each[1], each[0]))


@pytest.fixture(scope="module", params=["IVF4,Flat", "RR16,IVF4,RaBitQ4"])
def indexed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle
) -> Indexed:
    folder = tmp_path_factory.mktemp("conjunction")
    return Indexed(PlantedIndex.make(folder / "index", tiny_bundle), request.param)


CLAUSES = [
    [([0, 1], [])],
    [([0, 0], [])],
    [([0], [1])],
    [([0, 1, 2], [])],
    [([0], []), ([1], [])],
    [([0, 1], [2]), ([2], [0])],
]


@pytest.mark.parametrize("clauses", CLAUSES, ids=str)
@pytest.mark.parametrize("k", [3, 500])
def test_answers_are_those_of_all_images(
    indexed: Indexed, clauses: list[tuple[list[int], list[int]]], k: int
) -> None:
    limits = np.array([0.35, 0.3, 0.4])
    exact = indexed.exact(clauses, limits)
    found = search_clauses(
        indexed.segments, indexed.terms, clauses, k, objects=indexed.objects, limits=limits
    )
    assert list(zip(found.image_ids.tolist(), found.scores.tolist(), strict=True)) == exact[:k]
    assert found.is_complete == (len(exact) >= k)
    assert found.is_exhaustive or found.is_complete
    assert found.num_candidates <= 120


def test_few_images_are_all_scored(indexed: Indexed) -> None:
    limits, only = np.full(3, np.inf), np.arange(0, 60, dtype=np.int64)
    exact = [each for each in indexed.exact([([0, 1], [])], limits) if each[0] < 60 and each[0] != 5]
    found = search_clauses(
        indexed.segments, indexed.terms, [([0, 1], [])], 100, objects=indexed.objects, limits=limits,
        only_image_ids=only, exclude_image_ids=np.array([5, 100]),
    )  # fmt: skip
    assert found.image_ids.tolist() == [image_id for image_id, _ in exact]
    assert found.is_exhaustive
    nothing = search_clauses(
        indexed.segments, indexed.terms, [([0], [])], 5, objects=indexed.objects, limits=limits,
        only_image_ids=np.empty(0, np.int64),
    )  # fmt: skip
    assert not len(nothing.image_ids)
    assert not nothing.is_complete


def test_the_proof_ends_the_rounds_early(
    tmp_path: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly all images have one of two things; where the best has both, the rest need no look."""
    rng = np.random.default_rng(2)
    terms = np.eye(2, DIM, dtype=np.float32)
    common = []
    for number in range(1500):
        vectors = random_units(rng, 2) * 0.3
        vectors[:, number % 2] = 1.0
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        common.append(Planted(f"{number}", vectors, [(0, 0, 1, 1), (0, 0, 0.5, 0.5)]))
    both = [Planted("both", terms, [(0, 0, 1, 1), (0, 0, 0.5, 0.5)])]
    planted = PlantedIndex.make(tmp_path / "index", tiny_bundle)
    planted.add(common + both)
    snapshot = planted.publish(nprobe=2)
    segments = open_segments(planted.layout, tiny_bundle.fingerprint, snapshot.segments, nprobe=2)
    images = open_table(planted.images_uri)

    def search(k: int) -> conjunction.Matches:
        return search_clauses(
            segments, terms, [([0, 1], [])], k,
            objects=lambda ids: take_objects(images, ids), limits=np.full(2, np.inf),
        )  # fmt: skip

    found = search(1)
    assert found.image_ids.tolist() == [1500]
    assert (found.is_proven, found.is_exhaustive) == (True, False)
    assert found.num_candidates < 1000
    monkeypatch.setattr(conjunction, "MAX_LOOKED_AT", 10)
    cut = search(40)
    assert cut.is_complete
    assert not cut.is_exhaustive
    assert not cut.is_proven
    assert cut.num_candidates < 1501


@pytest.mark.parametrize("clauses", CLAUSES, ids=str)
def test_a_bound_holds_to_the_image(
    indexed: Indexed, monkeypatch: pytest.MonkeyPatch, clauses: list[tuple[list[int], list[int]]]
) -> None:
    monkeypatch.setattr(conjunction, "FEW_IMAGES", 0)
    monkeypatch.setattr(conjunction, "num_candidates", lambda k: 8)
    looked_at: list[int] = []

    def objects(ids: NDArray[np.int64]) -> ImageObjects:
        looked_at.extend(ids.tolist())
        return indexed.objects(ids)

    def search(most: int) -> conjunction.Matches:
        looked_at.clear()
        return search_clauses(
            indexed.segments, indexed.terms, clauses, 200, objects=objects, limits=np.full(3, np.inf),
            max_looked_at=most,
        )  # fmt: skip

    cut = search(50)
    assert len(looked_at) == len(set(looked_at)) == cut.num_candidates == 50
    assert (cut.is_complete, cut.is_exhaustive, cut.is_proven) == (False, False, False)
    exact = dict(indexed.exact(clauses, np.full(3, np.inf)))
    found = dict(zip(cut.image_ids.tolist(), cut.scores.tolist(), strict=True))
    assert found == {image_id: exact[image_id] for image_id in set(looked_at) & set(exact)}
    assert search(3).num_candidates == 8
    whole = search(10_000)
    assert whole.is_exhaustive
    assert len(whole.image_ids) == len(exact)


def test_images_by_the_rank_of_their_best_hit() -> None:
    hits = np.array([[9, 9, 4, 7], [8, 2, 9, -1]])
    vector_ids = np.where(hits < 0, -1, hits * MAX_SLOTS + np.array([[0], [3]]))
    assert conjunction._by_rank(vector_ids).tolist() == [9, 8, 2, 4, 7]
    assert not len(conjunction._by_rank(np.full((2, 3), -1)))


def test_the_best_hits_are_looked_at_before_a_bound(
    tmp_path: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later an image's id, the better it is: the bound leaves out the first ids, not the best hits."""
    monkeypatch.setattr(conjunction, "FEW_IMAGES", 0)
    monkeypatch.setattr(conjunction, "num_candidates", lambda k: 8)
    terms = np.eye(2, DIM, dtype=np.float32)
    planted = PlantedIndex.make(tmp_path / "index", tiny_bundle)
    images = []
    for number in range(60):
        vectors = np.concatenate([terms, np.eye(2, DIM, 2, dtype=np.float32)]) * 0.1
        low = 0.2 + number / 100
        vectors[0, [0, 3]], vectors[1, [1, 4]] = [low, np.sqrt(1 - low**2)], [low, np.sqrt(1 - low**2)]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        images.append(Planted(f"{number}", vectors, [(0, 0, 1, each / 4) for each in range(1, 5)]))
    planted.add(images, codec="IVF1,Flat")
    snapshot = planted.publish(nprobe=1)
    segments = open_segments(planted.layout, tiny_bundle.fingerprint, snapshot.segments, nprobe=1)
    table, looked_at = open_table(planted.images_uri), list[NDArray[np.int64]]()

    def objects(ids: NDArray[np.int64]) -> ImageObjects:
        looked_at.append(ids)
        return take_objects(table, ids)

    found = search_clauses(
        segments, terms, [([0, 1], [])], 60, objects=objects, limits=np.full(2, np.inf), max_looked_at=20
    )
    assert found.image_ids.tolist() == list(range(59, 39, -1))
    assert all((np.diff(ids) > 0).all() for ids in looked_at)  # as the table is read


@pytest.mark.parametrize(
    ("k", "clauses", "limits"),
    [(0, [([0], [])], 3), (1, [], 3), (1, [([], [0])], 3), (1, [([0], [])], 2)],
)
def test_wrong_arguments(
    indexed: Indexed, k: int, clauses: list[tuple[list[int], list[int]]], limits: int
) -> None:
    with pytest.raises(ValueError, match="expected"):
        search_clauses(
            indexed.segments, indexed.terms, clauses, k, objects=indexed.objects, limits=np.full(limits, 1.0)
        )
