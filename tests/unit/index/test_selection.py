"""A filter finds what exact search finds among the images that it allows, in whichever way it is applied."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from for_ray.evaluation.exact import exact_top_images
from for_ray.index import search, selection
from for_ray.index.search import SegmentSet, search_images
from for_ray.index.selection import Remembered, is_among, select_parts
from for_ray.index.similar import search_similar

ALL_LISTS = 1 << 20
SPANS = [(0, 100), (100, 250), (250, 300)]
CODECS = ["IVF8,Flat", "IVF8_HNSW8,Flat", "IVF8,SQ8", "HR,IVF8,RaBitQ4"]


def draw_filters(seed: int):
    """Some, a run of, few, one, none and all of 300 images; and gone ones that overlap."""
    random = np.random.default_rng(seed)
    start = int(random.integers(0, 200))
    only = [
        np.sort(random.choice(300, 140, replace=False)),
        np.arange(start, start + 80),
        np.sort(random.choice(300, 5, replace=False)),
        np.array([299]),
        np.empty(0, np.int64),
        np.arange(300),
        None,
    ]
    excluded = [
        None,
        np.empty(0, np.int64),
        np.sort(random.choice(300, 40, replace=False)),
        np.arange(90, 130),
    ]
    return [(some, gone) for some in only for gone in excluded]


def allowed(images, only, excluded):
    ids = images.image_ids if only is None else np.intersect1d(images.image_ids, only)
    return ids if excluded is None else np.setdiff1d(ids, excluded)


@pytest.fixture(params=["compared", "selected", "dropped"])
def way(request, monkeypatch):
    """How a filter is applied: by comparing few images, by FAISS's selectors, by dropping hits."""
    if request.param != "compared":
        monkeypatch.setattr(search, "FEW_IMAGES", -1000)
    if request.param == "dropped":
        monkeypatch.setattr(selection, "MAX_BITMAP_BYTES", 0)
    return request.param


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_filtered_search_equals_exact_search_of_what_it_allows(
    make_images, make_queries, build, way, codec, seed
):
    images = make_images(300)._replace(image_ids=np.arange(300))
    paths = build(images, codec, cuts=[100, 250]).paths
    # k of 7 with candidates of 107: where codes are approximate, all that a filter allows may be ranked.
    k = 7 if codec.endswith("Flat") else 60
    for spans in (SPANS, None):
        segments = SegmentSet(paths, nprobe=ALL_LISTS, spans=spans)
        for query in make_queries(2):
            for only, excluded in draw_filters(seed):
                found = search_images(
                    segments, query, k, exact=images.take, only_image_ids=only, exclude_image_ids=excluded
                )
                right = allowed(images, only, excluded)
                ids, scores = exact_top_images([images.take(right)], query[None], k)
                np.testing.assert_array_equal(found.image_ids, ids[0])
                np.testing.assert_array_equal(found.scores, scores[0])
                assert found.is_complete or found.is_exhaustive


def test_a_picture_is_looked_for_among_what_is_allowed(make_images, make_queries, build, way):
    images = make_images(300)._replace(image_ids=np.arange(300))
    segments = SegmentSet(build(images, cuts=[100, 250]).paths, nprobe=1, spans=SPANS)
    queries = make_queries(3)
    for only, excluded in draw_filters(2):
        given = {"only_image_ids": only, "exclude_image_ids": excluded}
        found = search_similar(segments, queries, 300, exact=images.take, **given)
        right = images.take(allowed(images, only, excluded))
        held = right.image_ids[np.diff(right.offsets) > 0]
        np.testing.assert_array_equal(np.sort(found.image_ids), held)


def test_nprobe_alone_decides_how_many_lists_a_measure_looks_at(make_images, make_queries, build):
    images = make_images(300)._replace(image_ids=np.arange(300))
    segments = SegmentSet(build(images).paths, nprobe=1)
    only = np.arange(0, 300, 2)
    found = search_images(
        segments, make_queries(1)[0], 150, exact=images.take, only_image_ids=only, probes_more=False
    )
    assert 0 < len(found.image_ids) < 100
    assert not found.is_exhaustive


def test_segments_outside_a_filter_are_not_searched():
    parts = select_parts(np.array([100, 101, 260]), None, SPANS)
    assert [part.is_empty for part in parts] == [True, False, False]
    assert [part.is_empty for part in select_parts(None, np.array([5]), SPANS)] == [False, False, False]
    assert [part.selector is None for part in select_parts(None, np.array([5]), SPANS)] == [False, True, True]


@pytest.mark.parametrize("wrong", [[3, 2], [2, 2], [[1, 2]]])
def test_ids_out_of_order_are_refused(make_images, make_queries, build, wrong):
    images = make_images(20)
    segments = SegmentSet(build(images).paths, nprobe=1)
    with pytest.raises(ValueError, match="in ascending order, each once"):
        search_images(segments, make_queries(1)[0], 3, exact=images.take, only_image_ids=np.array(wrong))


def test_ids_among_others():
    found = is_among(np.array([[1, 5], [9, 0]]), np.array([0, 5, 7]))
    assert found.tolist() == [[False, True], [False, True]]
    assert is_among(np.array([1, 2]), np.empty(0, np.int64)).tolist() == [False, False]


def test_what_arrays_mean_is_made_once_while_they_live():
    made = []
    remembered = Remembered(lambda only, excluded: made.append(None) or len(made))
    only, excluded = np.arange(3), np.arange(2)
    assert [remembered(only, excluded), remembered(only, excluded), remembered(only, None)] == [1, 1, 2]
    assert remembered(np.arange(3), excluded) == 3  # equal, but others
    del only, excluded
    gc.collect()
    assert not remembered._made
