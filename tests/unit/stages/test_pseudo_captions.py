"""Captions in an index of our own against a comparison with all, and the table of what came of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from for_ray.datasets.labelled import Ragged
from for_ray.errors import DataError
from for_ray.evaluation.similarity import VectorSets
from for_ray.index.plan import plan_index
from for_ray.stages import caption_table, pseudo_captions
from for_ray.stages.caption_table import CaptionLists, CaptionRun, read_table, record_uri, write_captions
from for_ray.stages.pseudo_captions import NUM_ASKED, CaptionIndex

RUN = CaptionRun(
    identity="a", encoder="e", fingerprint="f", threshold=0.2, most=3, num_images=3, num_unreadable=0,
    num_bare=1, num_captions=9, num_used=2,
)  # fmt: skip


def units(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def test_the_nearest_captions_are_those_of_a_comparison_with_all(tmp_path, monkeypatch):
    monkeypatch.setattr(pseudo_captions, "IMAGES_AT_ONCE", 7)
    captions, vectors = units(3000), units(20, seed=1)
    lengths = np.ones(21, np.int64)
    lengths[4] = 0  # unreadable
    images = VectorSets(np.concatenate([[0], np.cumsum(lengths)]), vectors)
    index = CaptionIndex(captions, tmp_path, threads=1)
    told: list[int] = []
    found = index.nearest(images, threshold=0.6, most=5, on_progress=told.append)
    index.close()
    assert told == [7, 14, 21]
    assert len(found.of_image) == 21
    assert not len(found.of_image.row(4))
    cosines = vectors.astype(np.float32) @ captions.astype(np.float32).T
    num_same = num_all = 0
    for image in range(21):
        if image == 4:
            continue
        query = image - (image > 4)
        near = np.argsort(-cosines[query])[:5]
        expected = near[cosines[query][near] >= 0.6].tolist()
        row = found.of_image.row(image).tolist()
        num_same += len(set(row) & set(expected))
        num_all += len(expected)
        assert len(row) <= 5
        start = found.of_image.offsets[image]
        exact = found.cosines[start : start + len(row)]
        np.testing.assert_allclose(exact, cosines[query][row], rtol=1e-5)
        assert (np.diff(exact) <= 0).all()
        assert (exact >= 0.6).all()
    assert num_all > 50
    assert num_same >= 0.95 * num_all


@pytest.fixture
def crowds() -> tuple[np.ndarray, np.ndarray]:
    """12,000 captions around 300 places, and 80 images beside captions: enough for codes in many lists."""
    rng = np.random.default_rng(0)
    centres = units(300, 64, seed=1).astype(np.float32)
    captions = centres[rng.integers(0, 300, 12_000)] + 0.2 * rng.standard_normal((12_000, 64))
    images = captions[rng.integers(0, 12_000, 80)] + 0.05 * rng.standard_normal((80, 64))
    return tuple(
        (each / np.linalg.norm(each, axis=1, keepdims=True)).astype(np.float16) for each in (captions, images)
    )  # type: ignore[return-value]


def test_codes_in_lists_find_what_their_measured_recall_says(tmp_path, monkeypatch, crowds):
    def plan(*given, **more):
        return plan_index(*given, **more).model_copy(update={"nprobe": 1})  # more is found to be needed

    monkeypatch.setattr(pseudo_captions, "plan_index", plan)
    captions, vectors = crowds
    images = VectorSets(np.arange(81), vectors)
    index = CaptionIndex(captions, tmp_path, threads=1)
    assert "RaBitQ" in plan_index(12_000, 64).factory
    cosines = vectors.astype(np.float64) @ captions.astype(np.float64).T
    right = np.argsort(-cosines, axis=1)[:, :20]

    def shares() -> np.ndarray:
        found = index.nearest(images, threshold=-1, most=20, on_progress=lambda _: None)
        return np.array([np.isin(near, found.of_image.row(row)).mean() for row, near in enumerate(right)])

    at_first = shares().mean()
    measured = index.measure(images, most=20)
    found = shares()
    index.close()
    asked = np.unique(np.linspace(0, 79, NUM_ASKED).astype(int))
    assert measured.recall == pytest.approx(found[asked].mean(), abs=1e-9)
    assert at_first < 0.8
    assert measured.nprobe > 1
    assert measured.recall >= 0.95


def test_an_index_that_is_not_asked_has_no_recall(tmp_path):
    index = CaptionIndex(units(5), tmp_path, threads=1)
    assert index.measure(VectorSets(np.zeros(4, np.int64), units(0)), most=3).recall is None
    index.close()


def test_one_caption_is_enough(tmp_path):
    index = CaptionIndex(units(1), tmp_path, threads=1)
    images = VectorSets(np.arange(2), units(1))
    assert index.measure(images, most=20).recall == 1
    found = index.nearest(images, threshold=0.9, most=20, on_progress=lambda _: None)
    assert found.of_image.row(0).tolist() == [0]
    assert found.cosines[0] == pytest.approx(1, abs=1e-3)


LISTS = CaptionLists(
    RUN,
    ["/a.jpg", "/b.jpg", "/c.jpg"],
    Ragged(np.array([0, 2, 2, 3]), np.array([1, 0, 0], np.int32)),
    np.array([0.5, 0.3, 0.4], np.float32),
)


def captions(vectors: np.ndarray) -> pa.Table:
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    return pa.table({"text": [f"caption {row}" for row in range(len(vectors))], "vector": values})


def test_a_table_is_read_as_it_was_written(tmp_path):
    vectors = units(2)
    write_captions(str(tmp_path / "out"), LISTS, [captions(vectors)])
    found = read_table(str(tmp_path / "out"))
    assert (found.run, found.uris) == (RUN, LISTS.uris)
    np.testing.assert_array_equal(found.vectors, vectors)
    np.testing.assert_array_equal(found.cosines, LISTS.cosines)
    assert pq.read_table(tmp_path / "out" / "captions.parquet")["text"].to_pylist() == [
        "caption 0",
        "caption 1",
    ]
    near = found.nearest(["/c.jpg", "/new.jpg", "/a.jpg", "/b.jpg"], threshold=0.2, most=20)
    assert [near.row(row).tolist() for row in range(4)] == [[0], [], [1, 0], []]
    assert found.holds(["/c.jpg", "/new.jpg", "/b.jpg"]).tolist() == [True, False, True]
    assert found.nearest(["/a.jpg"], threshold=0.4, most=20).row(0).tolist() == [1]
    assert found.nearest(["/a.jpg"], threshold=0.2, most=1).row(0).tolist() == [1]
    assert found.run.describe().startswith("2 of 9 captions are near an image; 1 of 3 images have none")


def test_captions_are_written_and_read_some_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_table, "CAPTIONS_AT_ONCE", 3)
    vectors = units(1000, 1024)
    held: list[int] = []

    def parts() -> Iterator[pa.Table]:
        for start in range(0, 1000, 5):
            held.append(pa.total_allocated_bytes())
            yield captions(vectors[start : start + 5])

    write_captions(str(tmp_path / "out"), LISTS, parts())
    assert max(held) - held[0] < vectors.nbytes / 4
    file = pq.ParquetFile(tmp_path / "out" / "captions.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(4)] == [3, 2, 3, 2]
    np.testing.assert_array_equal(read_table(str(tmp_path / "out")).vectors, vectors)
    pq.write_table(captions(vectors), tmp_path / "out" / "captions.parquet")  # all in one row group
    np.testing.assert_array_equal(read_table(str(tmp_path / "out")).vectors, vectors)


def test_a_table_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(DataError, match="no pseudo-captions at"):
        read_table(str(tmp_path / "none"))
    write_captions(str(tmp_path / "out"), LISTS, [captions(units(2))])
    whole = (tmp_path / "out" / "captions.parquet").read_bytes()
    (tmp_path / "out" / "captions.parquet").write_bytes(b"cut")
    with pytest.raises(DataError, match="no readable Parquet"):
        read_table(str(tmp_path / "out"))
    (tmp_path / "out" / "captions.parquet").write_bytes(whole)
    (tmp_path / "out" / "images.parquet").write_bytes(b"cut")
    with pytest.raises(DataError, match="no readable Parquet"):
        read_table(str(tmp_path / "out"))
    (tmp_path / "out" / "captions.json").write_text("{}")
    with pytest.raises(DataError, match="is no record of pseudo-captions"):
        read_table(str(tmp_path / "out"))
    assert record_uri("s3://b/out") == "s3://b/out/captions.json"
