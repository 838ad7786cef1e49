"""Captions in parts, from the disk to a table of vectors and back, by the functions that Ray would call."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from for_ray.errors import DataError, StageError, StorageError
from for_ray.index.table import append, create_table
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.model.encoder import load_encoder
from for_ray.stages import caption_vectors
from for_ray.stages.caption_vectors import (
    CaptionJob,
    EmbedCaptions,
    KeptVectors,
    SpooledCaptions,
    captions_at,
    embed_captions,
    find_kept,
    local_vectors,
    spool_captions,
    write_rows,
)
from for_ray.stages.encode import Pool

TEXTS = [f"{number} things" for number in range(11)]
POOL = Pool(1, 1, num_gpus=0, num_cpus=0.5)


@pytest.fixture
def bundle() -> Bundle:
    return open_bundle("picturebook", head="clip", image_size=64)


@pytest.fixture
def spooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpooledCaptions:
    """Eleven captions in files of four."""
    monkeypatch.setattr(caption_vectors, "PART_CAPTIONS", 4)
    told: list[int] = []
    found = spool_captions([TEXTS[:3], [], TEXTS[3:]], tmp_path / "texts", on_progress=told.append)
    assert told == [4, 8, 11]
    return found


def test_captions_lie_in_parts_that_their_hash_does_not_depend_on(spooled, tmp_path):
    assert [path.name for path in spooled.paths] == ["000000.parquet", "000001.parquet", "000002.parquet"]
    again = spool_captions([[text] for text in TEXTS], tmp_path / "again", on_progress=lambda _: None)
    assert (again.num_captions, again.content) == (11, spooled.content)
    other = spool_captions([TEXTS[:-1]], tmp_path / "other", on_progress=lambda _: None)
    assert other.content != spooled.content


def test_ranges_cover_the_captions_and_lie_in_one_file_each(spooled):
    ranges = caption_vectors._ranges(11, 3).to_pydict()
    assert ranges == {"first": [0, 3, 4, 7, 8], "num_rows": [3, 1, 3, 1, 3]}


def test_ranges_in_any_order_become_a_table_in_the_captions_order(spooled, bundle, tmp_path, monkeypatch):
    table = create_table(f"{tmp_path}/table.lance", caption_vectors._schema(bundle.dim))
    actor = EmbedCaptions(CaptionJob(bundle, "cpu", str(tmp_path / "texts"), table.uri))
    ranges = caption_vectors._ranges(11, 3)
    blocks = [actor(ranges.slice(row, 1)) for row in (4, 1, 3, 0, 2)]
    written = [write_rows(block, table_uri=table.uri) for block in (blocks[0], pa.concat_tables(blocks[1:]))]
    rows = pa.concat_tables(written).sort_by("first").to_pydict()
    assert rows["first"] == [0, 3, 4, 7, 8]
    table = append(table, [fragment for some in rows["fragments"] for fragment in some])
    vectors = local_vectors(table, tmp_path / "vectors")
    expected = load_encoder(bundle, "cpu").embed_captions(TEXTS)
    np.testing.assert_allclose(vectors.astype(np.float32), expected, atol=1e-3)
    monkeypatch.setattr(caption_vectors, "MANY_CAPTIONS", 2)
    some = list(captions_at(table, vectors, np.array([0, 4, 9])))
    assert [each["text"].to_pylist() for each in some] == [[TEXTS[0], TEXTS[4]], [TEXTS[9]]]
    np.testing.assert_array_equal(some[1]["vector"].to_pylist(), vectors[[9]])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a disk that is full
    try:
        with pytest.raises(StorageError, match="full"):
            local_vectors(table, tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    table.delete("_rowid = 2")
    with pytest.raises(DataError, match="was changed: delete what lies there"):
        local_vectors(table, tmp_path / "again")


def test_a_caption_without_a_finite_vector_is_named(spooled, bundle, tmp_path):
    actor = EmbedCaptions(CaptionJob(bundle, "cpu", str(tmp_path / "texts"), "unused"))
    vectors = np.ones((3, bundle.dim), np.float32)
    vectors[1, 2] = np.nan
    actor._encoder.embed_captions = lambda texts: vectors
    with pytest.raises(DataError, match=f"no finite vector for '{TEXTS[5]}': take another --encoder"):
        actor(pa.table({"first": [4], "num_rows": [3]}))


def test_a_run_that_fails_leaves_nothing_and_one_that_ends_is_found(spooled, bundle, tmp_path, monkeypatch):
    kept = str(tmp_path / "kept")

    def lose(num_captions, job, pool, on_progress):
        assert len(list((tmp_path / "kept").glob("texts-*/*.parquet"))) == 3
        raise StageError("captions", "lost")

    def embed(num_captions, job, pool, on_progress):
        actor, ranges = EmbedCaptions(job), caption_vectors._ranges(num_captions, 4)
        blocks = [actor(ranges.slice(row, 1)) for row in range(ranges.num_rows)]
        rows = [write_rows(block, table_uri=job.table_uri)["fragments"].to_pylist() for block in blocks]
        return [fragment for [fragments] in rows for fragment in fragments]

    def run() -> object:
        return embed_captions(spooled, bundle, POOL, kept, device="cpu", on_progress=lambda _: None)

    assert find_kept(kept, spooled, bundle) is None
    monkeypatch.setattr(caption_vectors, "_embed", lose)
    with pytest.raises(StageError, match="lost"):
        run()
    assert not [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    monkeypatch.setattr(caption_vectors, "_embed", embed)
    run()
    found = find_kept(kept, spooled, bundle)
    assert found.count_rows() == 11
    [record] = (tmp_path / "kept").glob("*.json")
    assert KeptVectors.model_validate_json(record.read_text()).num_captions == 11
    assert not list((tmp_path / "kept").glob("texts-*"))
    assert find_kept(kept, spooled._replace(content="other"), bundle) is None
    assert find_kept(kept, spooled, open_bundle("picturebook", head="clip", image_size=32)) is not None
    record.write_text(json.dumps({"table": "a"}))
    with pytest.raises(DataError, match="is no record of captions' vectors: delete it"):
        find_kept(kept, spooled, bundle)
