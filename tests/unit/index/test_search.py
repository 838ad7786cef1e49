"""Search in segments: equal to exact search where that is promised, and never short of images."""

from __future__ import annotations

import threading

import faiss
import numpy as np
import pytest

from for_ray.errors import DataError
from for_ray.evaluation.exact import exact_top_images, recall_at_k
from for_ray.index import rabitq as rabitq_module
from for_ray.index.search import SegmentSet, search_images
from for_ray.schema import image_ids_of, pack_vector_ids

ALL_LISTS = 1 << 20
CODECS = ["IVF8,Flat", "IVF8_HNSW8,Flat", "RR16,IVF8,Flat", "IVF8,SQ8", "IVF8,RaBitQ4", "HR,IVF8,RaBitQ4"]


def exact_answer(images, query, k, without=()):
    keep = np.isin(images.image_ids, without, invert=True)
    ids, scores = exact_top_images([images.take(images.image_ids[keep])], query[None], k)
    return ids[0], scores[0]


class TestImages:
    @pytest.mark.parametrize("k", [1, 7, 50, 299, 300, 5000])
    @pytest.mark.parametrize("codec", ["IVF8,Flat", "IVF8_HNSW8,Flat"])
    def test_flat_codec_and_all_lists_equal_exact_search(self, make_images, make_queries, build, k, codec):
        images = make_images(300)
        segments = SegmentSet(build(images, codec, cuts=[100, 250]).paths, nprobe=ALL_LISTS)
        for query in make_queries(5):
            found = search_images(segments, query, k, exact=images.take)
            ids, scores = exact_answer(images, query, k)
            np.testing.assert_array_equal(found.image_ids, ids)
            np.testing.assert_array_equal(found.scores, scores)
            assert found.is_complete == (len(ids) == k)
            assert found.is_complete or found.is_exhaustive

    @pytest.mark.parametrize("codec", CODECS)
    def test_every_codec_is_exact_when_all_images_are_candidates(
        self, make_images, make_queries, build, codec
    ):
        images = make_images(120)
        segments = SegmentSet(build(images, codec, cuts=[50]).paths, nprobe=1)
        for query in make_queries(5):
            found = search_images(segments, query, 25, exact=images.take)
            ids, scores = exact_answer(images, query, 25)
            np.testing.assert_array_equal(found.image_ids, ids)
            np.testing.assert_array_equal(found.scores, scores)

    def test_the_slot_is_the_best_vector(self, make_images, make_queries, build):
        images = make_images(200)
        segments = SegmentSet(build(images).paths, nprobe=8)
        query = make_queries(1)[0]
        found = search_images(segments, query, 20, exact=images.take)
        for image_id, slot, score in zip(found.image_ids, found.slots, found.scores, strict=True):
            cosines = images.take(np.array([image_id])).vectors.astype(np.float64) @ query
            assert slot == cosines.argmax()
            assert score == pytest.approx(cosines.max(), abs=1e-6)

    def test_many_equal_images_are_ranked_by_id_beyond_the_candidates(self, make_images, build):
        # 1500 images with one and the same vector: more than the first fetch of 412 hits, and the lowest ids
        # must win.
        rng = np.random.default_rng(3)
        images = make_images(4000, max_slots=1, seed=3)
        has_vector = np.flatnonzero(np.diff(images.offsets))
        query = images.vectors[0].astype(np.float32)
        equal = np.sort(rng.choice(len(has_vector), 1500, replace=False))
        images.vectors[equal] = images.vectors[0]
        order = rng.permutation(len(images.image_ids))  # FAISS sees them in no order of ids
        segments = SegmentSet(build(images.take(images.image_ids[order])).paths, nprobe=1)
        found = search_images(segments, query, 3, exact=lambda ids: images.take(ids[::-1]))
        ids, scores = exact_answer(images, query, 3)
        np.testing.assert_array_equal(found.image_ids, ids)
        assert len(set(scores)) == 1
        assert found.num_candidates >= 1500

    def test_an_image_whose_slots_fill_the_first_hits_does_not_starve_the_others(
        self, make_images, make_queries, build
    ):
        images = make_images(2000, max_slots=4)
        query = make_queries(1)[0]
        # 30 images with 200 slots each, all nearer to the query than anything else.
        rng = np.random.default_rng(5)
        near = query + 0.02 * rng.normal(size=(30 * 200, 16))
        near = (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float16)
        ids = images.image_ids[-1] + 1 + np.arange(30)
        offsets = np.concatenate([images.offsets, images.offsets[-1] + 200 * np.arange(1, 31)])
        crowd = type(images)(
            np.concatenate([images.image_ids, ids]), offsets, np.concatenate([images.vectors, near])
        )
        segments = SegmentSet(build(crowd, cuts=[1000]).paths, nprobe=ALL_LISTS)
        first = segments.search(query[None], 1000)
        assert len(np.unique(image_ids_of(first.vector_ids))) <= 30  # the crowd does fill them
        found = search_images(segments, query, 50, exact=crowd.take)
        np.testing.assert_array_equal(found.image_ids, exact_answer(crowd, query, 50)[0])
        assert found.is_complete
        assert not found.is_exhaustive

    def test_lists_are_widened_when_those_probed_hold_too_few_images(self, make_images, make_queries, build):
        images = make_images(60)
        segments = SegmentSet(build(images).paths, nprobe=1)
        held = int((np.diff(images.offsets) > 0).sum())
        found = search_images(segments, make_queries(1)[0], 60, exact=images.take)
        assert len(found.image_ids) == held < 60
        assert (found.is_complete, found.is_exhaustive) == (False, True)

    def test_lists_are_not_widened_where_they_are_what_is_measured(self, make_images, make_queries, build):
        images = make_images(400)
        segments = SegmentSet(build(images, "IVF8,Flat").paths, nprobe=1)
        excluded = images.image_ids[:350]
        for query in make_queries(5):
            found = search_images(
                segments, query, 50, exact=images.take, exclude_image_ids=excluded, probes_more=False
            )
            probed = search_images(segments, query, 400, exact=images.take, probes_more=False)
            assert not found.is_exhaustive
            assert len(found.image_ids) < len(exact_answer(images, query, 50, without=excluded)[0])
            np.testing.assert_array_equal(
                found.image_ids, probed.image_ids[~np.isin(probed.image_ids, excluded)]
            )

    def test_excluded_images_are_not_found_and_others_take_their_places(
        self, make_images, make_queries, build
    ):
        images = make_images(400)
        segments = SegmentSet(build(images, cuts=[200]).paths, nprobe=ALL_LISTS)
        for query in make_queries(3):
            gone = np.sort(exact_answer(images, query, 30)[0])
            found = search_images(segments, query, 40, exact=images.take, exclude_image_ids=gone)
            np.testing.assert_array_equal(found.image_ids, exact_answer(images, query, 40, without=gone)[0])

    def test_all_images_excluded(self, make_images, make_queries, build):
        images = make_images(100)
        segments = SegmentSet(build(images).paths, nprobe=2)
        found = search_images(
            segments, make_queries(1)[0], 5, exact=images.take, exclude_image_ids=images.image_ids
        )
        assert len(found.image_ids) == 0
        assert (found.is_complete, found.is_exhaustive) == (False, True)

    def test_no_segments_and_empty_segments(self, make_images, make_queries, build):
        images = make_images(100)
        empty = build(images, cuts=[0]).paths[0]
        for segments in (SegmentSet([], nprobe=1), SegmentSet([empty], nprobe=1)):
            found = search_images(segments, make_queries(1)[0], 5, exact=images.take)
            assert len(found.image_ids) == len(found.slots) == len(found.scores) == 0
            assert (found.is_complete, found.is_exhaustive) == (False, True)
            assert segments.num_vectors == 0

    def test_one_vector(self, make_images, build):
        images = make_images(30).take(make_images(30).image_ids[[1]])
        one = type(images)(images.image_ids, np.array([0, 1]), images.vectors[:1])
        segments = SegmentSet(build(one, "IVF,Flat").paths, nprobe=1)
        found = search_images(segments, one.vectors[0].astype(np.float32), 1, exact=one.take)
        np.testing.assert_array_equal(found.image_ids, one.image_ids)
        assert found.scores[0] == pytest.approx(1.0, abs=2e-3)

    def test_images_without_stored_vectors_any_more_are_left_out(self, make_images, make_queries, build):
        images = make_images(200)
        segments = SegmentSet(build(images).paths, nprobe=ALL_LISTS)
        query = make_queries(1)[0]
        gone = exact_answer(images, query, 3)[0]
        found = search_images(segments, query, 10, exact=lambda ids: images.take(ids[~np.isin(ids, gone)]))
        np.testing.assert_array_equal(found.image_ids, exact_answer(images, query, 10, without=gone)[0])

    def test_without_exact_vectors_the_codec_ranks(self, make_images, make_queries, build):
        images = make_images(500)
        segments = SegmentSet(build(images).paths, nprobe=ALL_LISTS)
        query = make_queries(1)[0]
        found = search_images(segments, query, 20, exact=None)
        ids, scores = exact_answer(images, query, 20)
        np.testing.assert_array_equal(found.image_ids, ids)
        np.testing.assert_allclose(found.scores, scores, atol=1e-5)

    def test_the_rerank_lifts_the_recall_of_a_coarse_codec(self, make_images, make_queries, build):
        images = make_images(1500, dim=32, max_slots=12)
        segments = SegmentSet(build(images, "RR32,IVF16,RaBitQ2").paths, nprobe=ALL_LISTS)
        queries = make_queries(20, dim=32)
        exact = [exact_answer(images, query, 10)[0] for query in queries]
        coarse, fine = (
            recall_at_k(
                [search_images(segments, query, 10, exact=rerank).image_ids for query in queries], exact
            )
            for rerank in (None, images.take)
        )
        assert coarse < 0.7
        assert fine > 0.95

    @pytest.mark.parametrize(("k", "nprobe"), [(0, 1), (-1, 1), (5, 0)])
    def test_k_and_nprobe_below_one_are_refused(self, make_images, make_queries, build, k, nprobe):
        segments = SegmentSet(build(make_images(50)).paths, nprobe=1)
        with pytest.raises(ValueError, match=r">= 1"):
            search_images(segments, make_queries(1)[0], k, exact=None, nprobe=nprobe)

    def test_wrong_queries_are_refused(self, make_images, make_queries, build):
        segments = SegmentSet(build(make_images(50)).paths, nprobe=1)
        with pytest.raises(ValueError, match=r"expected queries of shape \[Q, 16\], got \[1, 15\]"):
            search_images(segments, make_queries(1)[0][:15], 5, exact=None)
        with pytest.raises(ValueError, match="NaN"):
            search_images(segments, np.full(16, np.nan, np.float32), 5, exact=None)


class TestVectors:
    @pytest.mark.parametrize("codec", CODECS)
    def test_segments_find_what_one_index_finds(self, make_images, make_queries, build, codec, monkeypatch):
        # By RaBitQ's signs FAISS leaves out what is far from the hits so far, which are others in a segment.
        # It goes by a bound that holds for nearly all vectors, and here for all.
        monkeypatch.setattr(rabitq_module, "ERROR_FACTOR", 20)
        images = make_images(300)
        whole = SegmentSet(build(images, codec).paths, nprobe=3)
        parts = SegmentSet(build(images, codec, cuts=[10, 11, 200], name="b").paths, nprobe=3)
        queries = make_queries(6)
        one, many = whole.search(queries, 40), parts.search(queries, 40)
        np.testing.assert_allclose(many.scores, one.scores, atol=1e-6)
        assert (many.vector_ids == one.vector_ids).mean() > 0.98  # equal codes may swap places
        assert (np.diff(many.scores, axis=1) <= 0).all()
        assert parts.num_vectors == whole.num_vectors == len(images.vectors)

    def test_what_a_bound_leaves_out_in_segments_is_little(self, make_images, make_queries, build):
        images, queries = make_images(300), make_queries(20)
        whole = SegmentSet(build(images, "HR,IVF8,RaBitQ4").paths, nprobe=3)
        parts = SegmentSet(build(images, "HR,IVF8,RaBitQ4", cuts=[10, 11, 200], name="b").paths, nprobe=3)
        found = [segments.search(queries, 40).vector_ids for segments in (whole, parts)]
        assert np.mean([len(set(one) & set(other)) / 40 for one, other in zip(*found, strict=True)]) > 0.99

    @pytest.mark.parametrize("codec", CODECS)
    def test_hits_are_faiss_own(self, make_images, make_queries, build, codec):
        images = make_images(300)
        built = build(images, codec)
        index = faiss.read_index(str(built.paths[0]))
        faiss.extract_index_ivf(index).nprobe = 8
        queries = make_queries(6)
        scores, _ = index.search(queries, 30)
        found = SegmentSet(built.paths, nprobe=8).search(queries, 30)
        np.testing.assert_allclose(found.scores, scores, atol=1e-6)

    def test_ids_beyond_32_bits_survive(self, make_images, build):
        images = make_images(100)
        segments = SegmentSet(build(images).paths, nprobe=ALL_LISTS)
        found = segments.search(images.vectors[:10].astype(np.float32), 10_000)
        assert found.vector_ids.min() > 1 << 47
        for row in found.vector_ids:
            np.testing.assert_array_equal(np.sort(row), np.sort(images.vector_ids))

    def test_a_batch_equals_its_members(self, make_images, make_queries, build):
        segments = SegmentSet(build(make_images(300), "IVF8,RaBitQ4").paths, nprobe=2, threads=2)
        queries = make_queries(9)
        batch = segments.search(queries, 10_000)
        assert (batch.vector_ids == -1).any()  # the lists differ in length
        for row, query in enumerate(queries):
            one = segments.search(query[None], 10_000)
            width = one.scores.shape[1]
            np.testing.assert_array_equal(one.vector_ids[0], batch.vector_ids[row, :width])
            assert (batch.vector_ids[row, width:] == -1).all()
            assert np.isneginf(batch.scores[row, width:]).all()

    def test_exclusion_widens_until_k_are_left(self, make_images, make_queries, build):
        images = make_images(400)
        segments = SegmentSet(build(images, cuts=[77]).paths, nprobe=ALL_LISTS)
        queries = make_queries(4)
        gone = images.image_ids[::2]
        found = segments.search(queries, 50, exclude_image_ids=gone)
        everything = segments.search(queries, len(images.vectors))
        for row in range(4):
            left = everything.vector_ids[row][~np.isin(image_ids_of(everything.vector_ids[row]), gone)]
            np.testing.assert_array_equal(found.vector_ids[row], left[:50])

    def test_nprobe_of_one_search_does_not_change_another_thread(self, make_images, make_queries, build):
        segments = SegmentSet(build(make_images(500)).paths, nprobe=8)
        queries = make_queries(8)
        want = {nprobe: segments.search(queries, 20, nprobe=nprobe) for nprobe in (1, 8)}
        wrong = []

        def ask(nprobe):
            for _ in range(30):
                found = segments.search(queries, 20, nprobe=nprobe)
                if not np.array_equal(found.vector_ids, want[nprobe].vector_ids):
                    wrong.append(nprobe)

        threads = [threading.Thread(target=ask, args=(nprobe,)) for nprobe in (1, 8, 1, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert not np.array_equal(want[1].vector_ids, want[8].vector_ids)

    def test_no_queries(self, make_images, make_queries, build):
        segments = SegmentSet(build(make_images(50)).paths, nprobe=1)
        assert segments.search(make_queries(1)[:0], 5).scores.shape == (0, 0)


class TestOpening:
    def test_a_segment_of_another_codec_is_refused(self, make_images, build):
        one, other = build(make_images(200)), build(make_images(200, seed=9), name="b")
        with pytest.raises(DataError, match=r"b-0.faiss is of another codec than .*a-0.faiss") as caught:
            SegmentSet([*one.paths, *other.paths], nprobe=1)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("codec", ["IVF8,SQ8", "IVF4,Flat", "RR16,IVF8,Flat", "IVF8,RaBitQ4"])
    def test_another_code_or_number_of_lists_is_refused(self, make_images, build, codec):
        one, other = build(make_images(200)), build(make_images(200), codec, name="b")
        for paths in ([*one.paths, *other.paths], [*other.paths, *one.paths]):
            with pytest.raises(DataError, match="another codec"):
                SegmentSet(paths, nprobe=1)

    def test_another_dimension_is_refused(self, make_images, build):
        one, other = build(make_images(200)), build(make_images(200, dim=8), name="b")
        with pytest.raises(DataError, match="another codec"):
            SegmentSet([*one.paths, *other.paths], nprobe=1)

    @pytest.mark.parametrize("codec", CODECS)
    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_a_file_cut_short_is_refused(self, make_images, build, codec, share):
        path = build(make_images(200), codec).paths[0]
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DataError, match="not a whole FAISS inverted file") as caught:
            SegmentSet([path], nprobe=1)
        assert "\n" not in str(caught.value)

    def test_other_files_are_refused(self, tmp_path):
        with pytest.raises(DataError, match="is no file"):
            SegmentSet([tmp_path / "none.faiss"], nprobe=1)
        index = faiss.IndexFlatIP(4)
        faiss.write_index(index, str(tmp_path / "flat.faiss"))
        with pytest.raises(DataError, match="not a whole FAISS inverted file"):
            SegmentSet([tmp_path / "flat.faiss"], nprobe=1)
        index = faiss.index_factory(4, "IVF1,Flat", faiss.METRIC_L2)
        index.train(np.eye(4, dtype=np.float32))
        faiss.write_index(index, str(tmp_path / "l2.faiss"))
        with pytest.raises(DataError, match="inner product"):
            SegmentSet([tmp_path / "l2.faiss"], nprobe=1)

    def test_slots_that_a_vector_id_holds(self):
        # The image of a vector is what search groups by: the highest slot must not spill over.
        ids = pack_vector_ids(np.array([5, 6]), np.array([255, 0]))
        np.testing.assert_array_equal(image_ids_of(ids), [5, 6])

    def test_closed_in_mid_search_is_no_short_answer(self, make_images, make_queries, build, monkeypatch):
        images = make_images(200)
        segments = SegmentSet(build(images).paths, nprobe=1)
        search = segments.search

        def search_and_close(*given, **more):
            hits = search(*given, **more)
            segments.close()
            return hits

        monkeypatch.setattr(segments, "search", search_and_close)
        with pytest.raises(ValueError, match="zip"):
            search_images(segments, make_queries(1)[0], 150, exact=images.take)
