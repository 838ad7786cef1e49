"""Questions to an index of planted vectors: what is found, in which boxes, on which page, and why no more."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from for_ray.errors import ConfigError
from for_ray.index import conjunction, search
from for_ray.index.probe import Hits, Searchable
from for_ray.model.bundle import Bundle
from for_ray.model.encoder import Encoded
from for_ray.retrieval import Answer, Filters, Hit, OpenIndex, Question, asking, open_index, paging
from for_ray.retrieval import opened as opened_module
from for_ray.retrieval.names import NameVectors
from for_ray.retrieval.opened import FILTERS_KEPT
from for_ray.retrieval.paging import read_token
from for_ray.retrieval.queries import overlaps, unwanted_limits
from for_ray.schema import image_ids_of
from tests.planted import Planted, PlantedIndex

DIM = 16
LEFT, RIGHT, WHOLE = (0.0, 0.0, 0.4, 1.0), (0.6, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)


class Names:
    """Stands for the random encoder's text tower, whose names all say nearly the same: each name an axis."""

    def reads_whole(self, name: str) -> bool:
        return True

    def embed_text(self, names: Sequence[str]) -> NDArray[np.float32]:
        axes = {"a dog": 0, "a cat": 1}
        return np.eye(DIM, dtype=np.float32)[[axes.get(name, 2 + len(name)) for name in names]]


def plant(dog: float, cat: float) -> NDArray[np.float32]:
    """A unit vector with these cosines with "a dog" and "a cat"."""
    return np.array([dog, cat, np.sqrt(1 - dog**2 - cat**2), *(DIM - 3) * [0]], np.float32)


def opened(planted: PlantedIndex) -> OpenIndex:
    """The index, published, with names that are axes."""
    planted.publish(nprobe=2)
    index = open_index(planted.uri)
    index._texts = NameVectors(Names())  # type: ignore[arg-type]
    return index


@pytest.fixture(scope="module")
def index(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> OpenIndex:
    """A dog and a cat; two dogs; one thing that is a bit of both; a dog; and 24 images of neither."""
    planted = PlantedIndex.make(tmp_path_factory.mktemp("asking") / "index", tiny_bundle)
    images = [
        Planted("/a/both.jpg", np.stack([plant(0.5, 0.6), plant(0.7, 0.1)]), [LEFT, RIGHT]),
        Planted("/a/dogs.jpg", np.stack([plant(0.72, 0.1), plant(0.71, 0.1)]), [LEFT, RIGHT]),
        Planted("/b/mixed.jpg", np.stack([plant(0.65, 0.65), plant(0.1, 0.1)]), [WHOLE, LEFT]),
        Planted("/b/dog.jpg", plant(0.6, 0.0)[None], [WHOLE]),
    ]
    for number in range(24):
        low = 0.1 + number / 1000
        images.append(
            Planted(f"/c/{number:02}.jpg", np.stack([plant(low, low), plant(0.1, low)]), [LEFT, RIGHT])
        )
    planted.add(images)
    return opened(planted)


def names(answer: Answer) -> list[str]:
    return [hit.uri[3:-4] for hit in answer.hits]


def test_and_gives_each_name_a_box_of_its_own(index: OpenIndex) -> None:
    answer = index.ask(Question("a dog AND a cat", k=3))
    assert names(answer) == ["both", "23", "22"]
    first = answer.hits[0]
    assert [(found.name, found.slot) for found in first.found] == [("a dog", 1), ("a cat", 0)]
    assert first.found[0].box == pytest.approx(RIGHT, abs=1e-6)
    assert first.found[1].box == pytest.approx(LEFT, abs=1e-6)
    assert [found.score for found in first.found] == pytest.approx([0.7, 0.6], abs=1e-3)
    assert first.score == first.found[1].score
    assert answer.names == ("a dog", "a cat")
    assert names(index.ask(Question("a dog AND a dog", k=2))) == ["dogs", "both"]


def test_or_takes_the_better_and_says_which(index: OpenIndex) -> None:
    answer = index.ask(Question("a dog OR a cat", k=4))
    assert names(answer) == ["dogs", "both", "mixed", "dog"]
    assert [hit.found[0].name for hit in answer.hits] == [
        "a dog",
        "a dog",
        answer.hits[2].found[0].name,
        "a dog",
    ]
    assert all(len(hit.found) == 1 for hit in answer.hits)


def test_not_leaves_out_what_shows_it(index: OpenIndex) -> None:
    answer = index.ask(Question("a dog NOT a cat", k=4))
    assert names(answer)[:2] == ["dogs", "dog"]
    assert not {"both", "mixed"} & set(names(answer))
    assert names(index.ask(Question("a dog NOT a cat", k=3, unwanted_above=0.62))) == ["dogs", "both", "dog"]
    everything = index.ask(Question("a dog NOT a cat", k=100))
    assert everything.is_exhaustive
    assert not everything.is_complete
    assert "the others show what NOT rules out" in (everything.reason or "")


def test_limits_stand_on_the_images_without_the_thing() -> None:
    rng = np.random.default_rng(1)
    cosines = np.concatenate([rng.normal(0.2, 0.02, 400), rng.normal(0.5, 0.02, 100)])
    vectors = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)
    [limit] = unwanted_limits((np.arange(500), np.arange(501), vectors), np.array([[1.0, 0.0]], np.float32))
    assert 0.22 < limit < 0.32
    none = np.empty((0, 2), np.float16)
    assert unwanted_limits((np.arange(1), np.array([0, 0]), none), np.eye(2, dtype=np.float32)).tolist() == [
        np.inf, np.inf,
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["a dog", "a dog AND a cat", "a dog OR a cat", "a dog NOT a cat"])
def test_pages_together_are_one_long_answer(index: OpenIndex, text: str) -> None:
    whole = index.ask(Question(text, k=100))
    assert whole.next_page is None
    pages, question = [], Question(text, k=5)
    while True:
        answer = index.ask(question)
        pages += answer.hits
        if answer.next_page is None:
            break
        question = replace(question, page=answer.next_page, k=len(pages) % 4 + 3)
    assert tuple(pages) == whole.hits
    assert answer.reason is None or len(answer.hits) < question.k


@pytest.mark.parametrize("fold_at", [None, 0.999])
@pytest.mark.parametrize("text", ["a dog", "a dog AND a cat", "a dog NOT a cat"])
def test_what_a_shallow_ranking_overlooks_comes_with_a_deeper_one(
    planted_index: PlantedIndex, monkeypatch: pytest.MonkeyPatch, text: str, fold_at: float | None
) -> None:
    """Few lists are looked at first, in coarse codes: the best image of all may come late, but comes once."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(700, 2, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    rows = [Planted(f"/{row}", vectors[row], [LEFT, RIGHT]) for row in range(len(vectors))]
    planted_index.add(rows, codec="IVF32,RaBitQ")
    index = opened(planted_index)
    monkeypatch.setattr(asking, "MAX_FOLDED", 10_000)
    monkeypatch.setattr(paging, "_RUNGS", (16, 48, 10_001))
    question = Question(text, k=1000, fold_at=fold_at, unwanted_above=0.5)
    whole = [hit.image_id for hit in index.ask(question).hits]
    pages: list[Hit] = []
    question = replace(question, k=7)
    while True:
        answer = index.ask(question)
        scores = [hit.score for hit in answer.hits]
        assert scores == sorted(scores, reverse=True)
        pages += answer.hits
        if answer.next_page is None:
            break
        question = replace(question, page=answer.next_page, k=len(pages) % 60 + 7)
    ids = [hit.image_id for hit in pages]
    assert ids != whole
    assert sorted(ids) == sorted(whole)


def test_equal_scores_on_two_pages(planted_index: PlantedIndex) -> None:
    planted_index.add([Planted(f"/{number}", plant(0.5, 0.1)[None]) for number in range(9)])
    index = opened(planted_index)
    first = index.ask(Question("a dog", k=4))
    second = index.ask(Question("a dog", k=4, page=first.next_page))
    assert [hit.image_id for hit in first.hits + second.hits] == list(range(8))


def forged(page: str) -> Iterator[str]:
    """Tokens of the same question with a value that no answer has."""
    end = read_token(page)
    for change in (
        {"depth": 65},
        {"score": float("nan")},
        {"score": 1e300},
        {"score": 1},
        {"image_id": "1"},
    ):
        yield end._replace(reached=(end.reached[0]._replace(**change),)).token()
    for change in (
        {"num_shown": 0},
        {"snapshot_id": True},
        {"reached": ()},
        {"reached": 1},
        {"reached": end.reached * 2},
        {"reached": ((64, 0.5),)},
    ):
        yield end._replace(**change).token()


def test_pages_of_something_else_are_refused(index: OpenIndex) -> None:
    page = index.ask(Question("a dog", k=2)).next_page
    assert page is not None
    with pytest.raises(ConfigError, match="of another question"):
        index.ask(Question("a cat", k=2, page=page))
    for token in ("x", "garbage!", "ü", page[:-2], base64.b64encode(b"[" * 5000).decode(), *forged(page)):
        with pytest.raises(ConfigError, match="no token"):
            index.ask(Question("a dog", k=2, page=token))
    with pytest.raises(ConfigError, match="beyond 10,000 images"):
        index.ask(Question("a dog", k=10_000, page=page))


def test_filters(index: OpenIndex) -> None:
    assert names(index.ask(Question("a dog", k=9, filters=Filters(under="/b/")))) == ["mixed", "dog"]
    both = Question("a dog AND a cat", k=1, filters=Filters(glob="/b/*"))
    assert names(index.ask(both)) == ["mixed"]
    only = index.ask(Question("a dog", k=9, filters=Filters(image_ids=(3, 0, 777))))
    assert names(only) == ["both", "dog"]
    assert (
        only.reason == "2 images: this snapshot of the index holds no more that pass the filter: one of 3 ids"
    )
    nothing = index.ask(Question("a dog", filters=Filters(where="uri = 'x'")))
    assert nothing.hits == ()
    assert nothing.reason == "no image of snapshot 1 passes the filter: where uri = 'x'"
    assert nothing.is_exhaustive


@pytest.mark.parametrize("text", ["a dog", "a dog AND a cat", "a dog NOT a cat"])
def test_a_filter_that_many_pass(index: OpenIndex, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """The index is searched, and not every image scored: the same answer."""
    for k in (2, 100):
        few = index.ask(Question(text, k=k, filters=Filters(image_ids=tuple(range(4, 20)))))
        monkeypatch.setattr(search, "FEW_IMAGES", 0)
        monkeypatch.setattr(search, "num_candidates", lambda k: 3)
        monkeypatch.setattr(conjunction, "FEW_IMAGES", 0)
        monkeypatch.setattr(conjunction, "num_candidates", lambda k: 3)
        many = index.ask(Question(text, k=k, filters=Filters(image_ids=tuple(range(4, 20)))))
        monkeypatch.undo()
        assert many.hits == few.hits
        assert {hit.image_id for hit in many.hits} <= set(range(4, 20))
        assert len(many.hits) == min(k, 16)


def test_a_picture_with_a_filter(index: OpenIndex) -> None:
    answer = index.ask(Question(like="0", k=2, filters=Filters(glob="/b/*")))
    assert sorted(names(answer)) == ["dog", "mixed"]
    assert index.ask(Question(like="0", filters=Filters(image_ids=()))).hits == ()


def reads_of(monkeypatch: pytest.MonkeyPatch) -> list[Filters]:
    """The filters that are looked up in the table from now on."""
    read: list[Filters] = []
    filtered_ids = opened_module.filtered_ids
    monkeypatch.setattr(
        opened_module,
        "filtered_ids",
        lambda images, asked: (read.append(asked) if asked else None) or filtered_ids(images, asked),
    )
    return read


def test_a_filter_is_read_once(index: OpenIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages and other questions with the same filter give the segments the very same array."""
    read = reads_of(monkeypatch)
    given: list[object] = []
    search_segments = index._segments.search
    monkeypatch.setattr(
        index._segments,
        "search",
        lambda *asked, **options: (
            given.append(options["only_image_ids"]) or search_segments(*asked, **options)
        ),
    )
    monkeypatch.setattr(search, "FEW_IMAGES", 0)
    monkeypatch.setattr(search, "num_candidates", lambda k: 3)
    monkeypatch.setattr(index, "_filtered", opened_module._kept_filters())
    first = index.ask(Question("a dog", k=2, filters=Filters(glob="/c/*")))
    again = index.ask(Question("a dog", k=2, filters=Filters(glob="/c/*"), page=first.next_page))
    assert [names(answer) for answer in (first, again)] == [["23", "22"], ["21", "20"]]
    index.ask(Question("a cat", k=2, filters=Filters(glob="/c/*")))
    assert read == [Filters(glob="/c/*")]
    assert len(given) >= 3
    assert {id(ids) for ids in given} == {id(given[0])}
    index.ask(Question("a dog", k=2))
    assert given[-1] is None
    others = [Filters(glob="/c/*", image_ids=tuple(range(4, 20 + each))) for each in range(FILTERS_KEPT)]
    for filters in [*others, others[0], Filters(glob="/c/*")]:
        index.ask(Question("a dog", k=2, filters=filters))
    assert read == [Filters(glob="/c/*"), *others, Filters(glob="/c/*")]
    assert len(index._filtered) == FILTERS_KEPT


def test_a_filter_by_the_time_is_read_each_time(index: OpenIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    read = reads_of(monkeypatch)
    monkeypatch.setattr(index, "_filtered", opened_module._kept_filters())
    chance, fixed = Filters(where="random() >= 0"), Filters(where="uri <> ''")
    for filters in (chance, fixed, chance, fixed):
        assert len(index.ask(Question("a dog", k=3, filters=filters)).hits) == 3
    assert read == [chance, fixed, chance]
    assert len(index._filtered) == 1


def test_kept_filters_are_bounded_by_their_bytes(index: OpenIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ids far apart take a bitmap of all between them."""
    read = reads_of(monkeypatch)
    monkeypatch.setattr(opened_module, "MAX_FILTER_BYTES", 2 * (40 + 8 + 32) + 5 * 40)
    monkeypatch.setattr(index, "_filtered", opened_module._kept_filters())
    one, other, prefix = Filters(image_ids=(3,)), Filters(image_ids=[4]), Filters(glob="/c/*")
    wide = Filters(image_ids=(0, 20))
    for filters in (one, other, one, other, prefix, prefix, one, wide, wide, other, other):
        index.ask(Question("a dog", k=2, filters=filters))
    assert read == [one, other, prefix, one, wide, other]
    assert len(index._filtered) == 1
    index.ask(Question("a dog", filters=one))
    assert len(index._filtered) == 2


def test_a_bound_ends_a_search_that_few_images_answer(
    index: OpenIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conjunction, "FEW_IMAGES", 0)
    monkeypatch.setattr(conjunction, "num_candidates", lambda k: 3)
    question = Question("a dog NOT a cat", k=1, unwanted_above=-1.0)
    whole = index.ask(question)
    assert (whole.hits, whole.num_looked_at, whole.is_exhaustive) == ((), 28, True)
    assert "no images: this snapshot of the index holds no more" in (whole.reason or "")
    cut = index.ask(question, max_looked_at=10)
    assert (cut.hits, cut.num_looked_at) == ((), 10)
    assert (cut.is_complete, cut.is_exhaustive, cut.is_proven) == (False, False, False)
    ended = "the search ended after 10 images, and others may answer; filter, or ask for what is less rare"
    assert cut.reason == f"no images: {ended}"
    some = index.ask(replace(question, k=10, unwanted_above=0.1045), max_looked_at=10)
    assert some.reason == f"{len(some.hits)} images: {ended}"
    assert 0 < len(some.hits) < 10
    lowest = replace(question, k=10, unwanted_above=0.1045, min_score=0.5)
    assert "others may answer" in (index.ask(lowest, max_looked_at=10).reason or "")
    at_all = index.ask(question, max_looked_at=28)
    assert (at_all.is_exhaustive, at_all.reason) == (True, whole.reason)


def test_lowest_score(index: OpenIndex) -> None:
    answer = index.ask(Question("a dog", min_score=0.68))
    assert names(answer) == ["dogs", "both"]
    assert answer.reason == "2 images: no others score 0.68 or more; the best of them has 0.6499"
    assert answer.next_page is None
    nothing = index.ask(Question("a dog AND a cat", min_score=0.9))
    assert nothing.hits == ()
    assert nothing.reason == "no images: none score 0.9 or more; the best of them has 0.6001"


def test_a_lowest_score_ends_the_search(index: OpenIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    rank = asking.Search._rank
    monkeypatch.setattr(asking, "depths", lambda wanted, begun: (3, 5, 7, 1000))
    monkeypatch.setattr(asking.Search, "_rank", lambda self, depth: asked.append(depth) or rank(self, depth))
    assert len(index.ask(Question("a dog", min_score=0.62)).hits) == 3
    assert asked == [3, 5]


class Noisy:
    """Segments whose code takes 0.06 from the score of one image, and adds 0.05 to those of others."""

    def __init__(self, segments: Searchable, image_id: int) -> None:
        self._segments, self._image_id = segments, image_id

    def __getattr__(self, name: str) -> int:
        return getattr(self._segments, name)

    def search(self, queries: NDArray[np.floating], k: int, **options: object) -> Hits:
        found = self._segments.search(queries, 1000, **options)
        is_wronged = image_ids_of(found.vector_ids[0]) == self._image_id
        scores = found.scores[0] + np.where(is_wronged, -0.06, 0.05).astype(np.float32)
        order = np.argsort(-scores, kind="stable")[:k]
        return Hits(scores[order][None], found.vector_ids[:, order])


def test_a_lowest_score_is_that_of_the_vector_and_not_of_its_code(
    index: OpenIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the code the image is the fourth, behind one that scores too little."""
    asked: list[int] = []
    rank = asking.Search._rank
    monkeypatch.setattr(index, "_segments", Noisy(index._segments, 2))
    monkeypatch.setattr(asking, "depths", lambda wanted, begun: (3, 5, 7, 1000))
    monkeypatch.setattr(search, "num_candidates", lambda k: k)
    monkeypatch.setattr(asking.Search, "_rank", lambda self, depth: asked.append(depth) or rank(self, depth))
    assert names(index.ask(Question("a dog", min_score=0.62))) == ["dogs", "both", "mixed"]
    assert asked == [3, 5]  # what may lie behind the fifth scores 0.23
    monkeypatch.setattr(asking, "DEEP", 3)
    assert names(index.ask(Question("a dog", min_score=0.62))) == ["dogs", "both"]


def test_folding(planted_index: PlantedIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    same = np.stack([plant(0.5, 0.1), plant(0.1, 0.5)])
    planted_index.add(
        [
            Planted("/best", np.stack([plant(0.52, 0.1), plant(0.1, 0.5)]), [LEFT, RIGHT]),
            Planted("/other", np.stack([plant(0.51, -0.5), plant(-0.8, 0.1)]), [LEFT, RIGHT]),
            Planted("/copy", same, [LEFT, RIGHT]),
            Planted("/copy2", same[::-1], [LEFT, RIGHT]),
            Planted("/far", plant(0.2, 0.9)[None], [LEFT]),
        ]
    )
    index = opened(planted_index)
    answer = index.ask(Question("a dog", k=3, fold_at=0.98))
    assert [hit.uri for hit in answer.hits] == ["/best", "/other", "/far"]
    assert [hit.folded for hit in answer.hits] == [("/copy", "/copy2"), (), ()]
    assert len(index.ask(Question("a dog", k=5)).hits) == 5
    page = index.ask(Question("a dog", k=1, fold_at=0.98)).next_page
    rest = index.ask(Question("a dog", k=5, fold_at=0.98, page=page))
    assert [hit.uri for hit in rest.hits] == ["/other", "/far"]
    with pytest.raises(ConfigError, match="beyond 1,000 images, all that are folded"):
        index.ask(Question("a dog", k=1001, fold_at=0.98))
    monkeypatch.setattr(asking, "MAX_FOLDED", 3)
    monkeypatch.setattr(asking, "depths", lambda wanted, begun: (wanted + 1, 1000))
    cut = index.ask(Question("a dog", k=3, fold_at=0.98))
    assert [hit.uri for hit in cut.hits] == ["/best", "/other"]
    assert cut.reason == "2 images: the first 4 fold into no more"
    monkeypatch.setattr(asking, "MAX_FOLDED", 2)
    last = index.ask(Question("a dog", k=2, fold_at=0.98))
    assert (last.is_complete, last.next_page) == (True, None)  # a third would be refused


def test_more_like_an_object(index: OpenIndex) -> None:
    answer = index.ask(Question(like="0:0", k=2))
    assert names(answer)[0] == "both"
    assert answer.hits[0].score == pytest.approx(1.0, abs=1e-3)
    assert answer.hits[0].slot == 0
    assert names(index.ask(Question(like="1", k=1))) == ["dogs"]
    for like, words in (
        ("0:2", "slots 0 to 1, got 2"),
        ("99", "image 99 is not in"),
        ("x", "IMAGE_ID:SLOT"),
        ("٣", "IMAGE_ID:SLOT"),
    ):
        with pytest.raises(ConfigError, match=words):
            index.ask(Question(like=like))


class Pictures(Names):
    """Sees three things in any picture, of which the last says what the first does."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def encode(self, pixels: NDArray[np.uint8]) -> Encoded:
        vectors = torch.eye(DIM)[[0, 1, 0]]
        boxes = torch.tensor([LEFT, RIGHT, WHOLE])
        return Encoded(vectors[None], boxes[None], torch.tensor([[True, True, False]]))


def test_region_takes_the_slot_that_fits_best(index: OpenIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    Image.new("RGB", (80, 60)).save(written, "PNG")
    monkeypatch.setattr(index, "_texts", NameVectors(Pictures(index.bundle)))
    for region, best in (((0.0, 0.0, 0.45, 0.9), "dogs"), ((0.4, 0.1, 1.0, 0.9), "mixed"), (WHOLE, "dogs")):
        answer = index.ask(Question(image=written.getvalue(), region=region, k=1))
        assert names(answer) == [best]
        assert answer.hits[0].found[0].name == ""


def test_overlaps() -> None:
    boxes = np.array([[0, 0, 1, 1], [0, 0, 0.5, 1], [0.5, 0.5, 1, 1]])
    assert overlaps(boxes, (0, 0, 0.5, 0.5)).tolist() == [0.25, 0.5, 0.0]


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (Question("a dog", region=(0, 0, 1, 1)), "a region is one of a picture"),
        (Question(image=b"x", region=(0, 0.5, 1, 0.5)), "0 <= x0 < x1 <= 1"),
        (Question("a dog", like="1"), "words, a picture, or an object"),
        (Question("a dog", k=2.5), "1 to 10,000 images, got 2.5: ask for a whole number"),  # type: ignore[arg-type]
        (Question("a dog", k=float("nan")), "got nan"),  # type: ignore[arg-type]
        (Question("a dog", k="2"), "got '2'"),  # type: ignore[arg-type]
        (Question("a dog", k=None), "got None"),  # type: ignore[arg-type]
        (Question("a dog", min_score=1.5), "-1 to 1, got 1.5"),
        (Question("a dog", fold_at=-0.1), "0 to 1, got -0.1"),
        (Question("a dog", unwanted_above=float("nan")), "got nan"),
        (Question("a dog", filters=Filters(where="nope = 1")), "No field named nope"),
    ],
    ids=str,
)
def test_wrong_questions(index: OpenIndex, question: Question, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        index.ask(question)


def test_more_objects_than_the_encoder_has_vectors(index: OpenIndex) -> None:
    answer = index.ask(Question(" AND ".join(f"thing {number}" for number in range(5))))
    assert answer.hits == ()
    assert answer.reason == "5 objects are asked for, and the index has 4 vectors an image"
    three = index.ask(Question("a AND b AND c"))
    assert three.hits == ()
    assert three.is_exhaustive
    assert three.reason == "no images: this snapshot of the index holds no more with so many objects"


def test_answer_as_json_says_how_far_it_looked(index: OpenIndex) -> None:
    answer = index.ask(Question("a dog", k=2))
    found = answer.to_json()
    assert set(found.pop("seconds")) == {"encode", "filter", "faiss", "rank", "search", "total"}
    assert found.pop("hits") == [hit.to_json() for hit in answer.hits]
    assert found == {
        "names": ["a dog"], "snapshot_id": 1, "num_looked_at": 28, "is_complete": True, "is_exhaustive": True,
        "is_proven": True, "reason": None, "next_page": answer.next_page,
    }  # fmt: skip


def test_sheet_has_a_colour_for_each_name(planted_index: PlantedIndex, tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), "white").save(tmp_path / "a.png")
    planted_index.add(
        [Planted(str(tmp_path / "a.png"), np.stack([plant(0.7, 0.1), plant(0.1, 0.7)]), [LEFT, RIGHT])]
    )
    index = opened(planted_index)
    hits = index.ask(Question("a dog AND a cat", k=1)).hits
    index.write_sheet(tmp_path / "sheet.jpg", hits, title="a dog AND a cat")
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        drawn = np.asarray(sheet.convert("RGB"), int)
    tile = drawn[112:352, 36:276]
    columns = [
        np.flatnonzero((np.abs(tile - colour).max(axis=-1) < 40).any(axis=0))
        for colour in ((255, 214, 10), (64, 200, 255))
    ]
    assert columns[0].max() < 110
    assert columns[1].min() > 130
