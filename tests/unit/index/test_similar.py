"""Search with a picture, against the definition of its score."""

import numpy as np
import pytest

from for_ray.index.search import SegmentSet
from for_ray.index.similar import search_similar

EMPTY = np.empty(0, np.int64)


def definition(images, queries, k, without=()):
    """Every image's mean of the best cosines, one image at a time."""
    rows = []
    for row, image_id in enumerate(images.image_ids):
        vectors = images.vectors[images.offsets[row] : images.offsets[row + 1]].astype(np.float64)
        if len(vectors) and image_id not in without:
            cosines = vectors @ queries.astype(np.float64).T
            rows.append(
                (-np.float32(cosines.max(axis=0).mean()), image_id, int(cosines.max(axis=1).argmax()))
            )
    rows.sort()
    return [(image_id, slot, -score) for score, image_id, slot in rows[:k]]


def answer(found):
    return list(zip(found.image_ids, found.slots, found.scores, strict=True))


@pytest.mark.parametrize("k", [1, 7, 50, 400])
def test_equals_the_definition_where_all_images_are_candidates(make_images, make_queries, build, k):
    images, queries = make_images(90), make_queries(5)
    segments = SegmentSet(build(images, cuts=[40]).paths, nprobe=1)
    found = search_similar(segments, queries, k, exact=images.take)
    assert answer(found) == definition(images, queries, k)
    assert found.is_complete == (k <= np.count_nonzero(np.diff(images.offsets)))


def test_an_image_finds_itself_first(make_images, build):
    images = make_images(2000)
    segments = SegmentSet(build(images, "RR16,IVF8,RaBitQ4").paths, nprobe=2)
    for row in np.flatnonzero(np.diff(images.offsets) > 2)[:20]:
        queries = images.vectors[images.offsets[row] : images.offsets[row + 1]]
        found = search_similar(segments, queries, 3, exact=images.take)
        assert found.image_ids[0] == images.image_ids[row]
        assert found.scores[0] == pytest.approx(1, abs=2e-3)


def test_excluded_images_are_not_found(make_images, make_queries, build):
    images, queries = make_images(60), make_queries(3)
    segments = SegmentSet(build(images).paths, nprobe=8)
    gone = np.sort(np.array([image_id for image_id, _, _ in definition(images, queries, 5)]))
    found = search_similar(segments, queries, 10, exact=images.take, exclude_image_ids=gone)
    assert answer(found) == definition(images, queries, 10, without=gone)
    none = search_similar(segments, queries, 10, exact=images.take, exclude_image_ids=images.image_ids)
    assert answer(none) == []
    assert none.is_exhaustive


def test_images_without_stored_vectors_any_more_are_left_out(make_images, make_queries, build):
    images, queries = make_images(60), make_queries(3)
    segments = SegmentSet(build(images).paths, nprobe=8)
    found = search_similar(segments, queries, 10, exact=lambda _: images.take(EMPTY))
    assert answer(found) == []


def test_no_segments(make_queries):
    found = search_similar(SegmentSet([], nprobe=1), make_queries(2), 4, exact=lambda ids: (ids, [0], []))
    assert answer(found) == []
    assert found.is_exhaustive


def test_wrong_queries_are_refused(make_images, make_queries, build):
    images = make_images(20)
    segments = SegmentSet(build(images).paths, nprobe=8)
    for queries, k in ((make_queries(3), 0), (make_queries(0), 1), (make_queries(2)[0], 1)):
        with pytest.raises(ValueError, match=r"expected queries \[Q, D\]"):
            search_similar(segments, queries, k, exact=images.take)
