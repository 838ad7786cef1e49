"""What workers do with a block: the rows that come in go out once, whatever is wrong with them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image

from for_ray.errors import StorageError
from for_ray.index import table
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.model.encoder import Encoded
from for_ray.schema import LISTING_SCHEMA, images_schema
from for_ray.stages import reading
from for_ray.stages.blocks import (
    CHANGED,
    DENIED,
    GONE,
    OK,
    EncodeCounts,
    EncodeImages,
    EncodeJob,
    write_block,
)
from for_ray.stages.reading import read_block
from for_ray.storage import stat
from tests.rights import open_folder, without_rights

MODEL = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 64,
        "layers": [1, 1, 1, 1],
        "width": 16,
        "head_width": 32,
        "patch_size": None,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("encoder") / "model.json"
    path.write_text(json.dumps(MODEL))
    return open_bundle(f"open_clip:{path}@random", num_slots=4, keep_threshold=1.0, allow_untrained=True)


@pytest.fixture
def job(bundle: Bundle, tmp_path: Path) -> EncodeJob:
    bundle.save(str(tmp_path / "bundle"))
    schema = images_schema(bundle.dim, pa.schema([("caption", pa.string()), ("licence", pa.string())]))
    images = table.create_table(str(tmp_path / "images.lance"), schema)
    return EncodeJob.of(bundle, str(tmp_path / "bundle"), images, device="cpu", batch_size=3, read_threads=2)


@pytest.fixture
def listed(tmp_path: Path) -> pa.Table:
    """Seven rows: good, broken, good, gone, replaced since, good, empty."""
    entries = []
    for number in range(7):
        path = tmp_path / f"{number}.png"
        raw = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 255, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((50, 40)).save(raw, "png")
        path.write_bytes({1: b"<html>", 6: b""}.get(number, raw.getvalue()))
        entries.append(stat(str(path)))
    (tmp_path / "3.png").unlink()
    columns = [list(column) for column in zip(*entries, strict=True)]
    columns[1][4] = columns[1][5]
    rows = pa.table(columns, schema=LISTING_SCHEMA)
    return rows.append_column("caption", pa.array([f"picture {number}" for number in range(7)]))


def test_what_can_be_read_comes_first_and_nothing_is_lost(job, listed):
    block = read_block(listed, job=job)
    assert [Path(uri).stem for uri in block["uri"].to_pylist()] == list("0251346")
    assert block["status"].to_pylist() == [OK, OK, OK, OK, GONE, CHANGED, OK]
    assert block["width"].to_pylist() == [50] * 3 + [None] * 4
    assert block["height"].to_pylist() == [40] * 3 + [None] * 4
    assert [error is None for error in block["error"].to_pylist()] == [True] * 3 + [False, True, True, False]
    assert block["error"][6].as_py() == "the file is empty"
    assert block["pixels"].type == pa.list_(pa.uint8(), 3 * 64 * 64)
    assert all(np.array(block["pixels"][row].as_py()).any() for row in range(3))


def test_a_store_that_refuses_is_no_bad_image(job, listed, monkeypatch):
    def refuse(*_: Any) -> bytes:
        raise StorageError("s3://b/k: access denied")

    monkeypatch.setattr(reading, "read_image", refuse)
    with pytest.raises(StorageError, match="access denied"):
        read_block(listed, job=job)


def test_an_image_that_may_not_be_read_is_quarantined_beside_others(job, listed):
    """Reading this process's memory at 0 is an input/output error, as of a bad sector."""
    listed = listed.slice(0, 2).set_column(0, "uri", [[listed["uri"][0].as_py(), "/proc/self/mem"]])
    listed = listed.set_column(1, "etag", [["", ""]])
    for rows in (listed, listed.slice(1)):
        block = read_block(rows, job=job)
        assert block["status"].to_pylist() == [OK] * rows.num_rows
        assert block["error"][-1].as_py().startswith("cannot read /proc/self/mem: ")
        assert block["error"][-1].as_py().endswith("; then run with --retry-quarantined")
    assert block["width"].to_pylist() == [None]


def test_where_no_row_may_be_read_but_their_place_be_listed_all_are_tried_again(job, listed):
    """The right to read may come back: what was stored as quarantined would not be read then."""
    with open_folder() as folder:
        uris = [str(folder / name) for name in ("a.jpg", "b.jpg", "gone.jpg", "c.jpg")]
        for uri in uris[:2]:
            Path(uri).touch(mode=0)
        Path(uris[3]).touch()
        rows = listed.slice(0, 4).set_column(0, "uri", [uris]).set_column(1, "etag", [["x", "x", "x", ""]])
        with without_rights():
            block = read_block(rows.slice(0, 3), job=job)
            beside = read_block(rows, job=job)
        told = "permission is denied; change the permissions or the user"
        errors = [f"cannot read {uri}: {told}" for uri in uris[:2]]
        assert block["status"].to_pylist() == [DENIED, DENIED, GONE]
        assert block["error"].to_pylist() == [*errors, None]
        written = write_block(EncodeImages(job, 1)(block), job=job)
        counts = EncodeCounts.of(written)
        assert (counts, written["fragments"][0].as_py()) == (EncodeCounts(gone=1, denied=2), [])
        assert (counts.skipped, counts.total) == (3, 3)
        assert beside["status"].to_pylist() == [OK, OK, GONE, OK]
        again = [f"{error}; then run with --retry-quarantined" for error in errors]
        assert beside["error"].to_pylist() == [*again, None, "the file is empty"]
        rows = rows.slice(0, 2)
        folder.chmod(0)
        with without_rights(), pytest.raises(StorageError, match=f"cannot read {uris[0]}: permission is"):
            read_block(rows, job=job)
        folder.chmod(0o755)


def test_a_uri_that_names_no_object_costs_its_row_alone(job, listed, tmp_path):
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    uris = [
        listed["uri"][0].as_py(),
        str(tmp_path / "circle.jpg"),
        str(tmp_path),
        f"{tmp_path}/{'n' * 300}.jpg",
        "/n" * 3000,
        "s3:///1.jpg",
        f"{tmp_path}/a\0.jpg",
    ]
    rows = listed.set_column(0, "uri", [uris]).set_column(1, "etag", [["x"] * 7])
    block = read_block(rows, job=job)
    assert block["uri"].to_pylist() == uris
    assert block["status"].to_pylist() == [OK] * 7
    assert block["width"].to_pylist() == [50] + [None] * 6
    reasons = ["links go round", "is a folder", "is longer", "is longer", "names no bucket", "is no path"]
    errors = block["error"].to_pylist()
    assert errors[0] is None
    assert [reason in error for reason, error in zip(reasons, errors[1:], strict=True)] == [True] * 6


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        (EncodeCounts(stored=3, quarantined=1), ""),
        (EncodeCounts(gone=1, changed=1), "; 2 images were not there, or not as listed, when they were read"),
        (EncodeCounts(denied=1200), "; 1,200 images could not be read and are tried again by the next run"),
    ],
)
def test_what_was_skipped_is_told(counts, told):
    assert counts.told == told
    both = counts.plus(EncodeCounts(gone=1, denied=1)).told
    assert (both.count(";"), "could not be read" in both) == (2, True)


def test_rows_are_stored_once_with_vectors_boxes_and_metadata(job, listed, tmp_path):
    written = write_block(EncodeImages(job, 1)(read_block(listed, job=job)), job=job)
    counts = EncodeCounts(*(written[name][0].as_py() for name in EncodeCounts._fields))
    assert counts == EncodeCounts(stored=5, quarantined=2, gone=1, changed=1)
    assert counts.total == 7
    images = table.append(table.require_table(job.table_uri), written["fragments"][0].as_py())
    rows = {Path(row["uri"]).stem: row for row in images.to_table().to_pylist()}
    assert sorted(rows) == list("01256")
    assert {name: len(row["vectors"]) for name, row in rows.items()} == {
        "0": 4,
        "1": 0,
        "2": 4,
        "5": 4,
        "6": 0,
    }
    assert all(row["caption"] == f"picture {name}" and row["licence"] is None for name, row in rows.items())
    assert all(row["encoded_at"] is not None for row in rows.values())
    vectors = np.array([rows[name]["vectors"] for name in "025"], np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=2e-3)


def test_blocks_and_batches_make_no_difference(job, listed):
    one = EncodeImages(job, 1)(read_block(listed, job=job))
    parts = [EncodeImages(job, 1)(read_block(listed.slice(row, 1), job=job)) for row in range(7)]
    single = pa.concat_tables(parts).sort_by("uri")
    one = one.sort_by("uri")
    assert one.drop_columns(["vectors"]).equals(single.drop_columns(["vectors"]))
    for row in range(7):
        np.testing.assert_allclose(
            np.array(one["vectors"][row].as_py(), np.float32),
            np.array(single["vectors"][row].as_py(), np.float32),
            atol=2e-3,
        )


def test_a_batch_of_several_blocks_gives_each_image_its_own_vectors(job, listed):
    """Ray puts blocks together into batches: the rows with pixels need not come first."""
    actor = EncodeImages(job, 1)
    parts = [read_block(listed.slice(start, 3), job=job) for start in (3, 0, 6)]
    together = actor(pa.concat_tables(parts))
    alone = {row["uri"]: row for part in parts for row in actor(part).to_pylist()}
    assert together.num_rows == len(alone) == 7
    for row in together.to_pylist():
        expected = alone[row["uri"]]
        assert {**row, "vectors": None} == {**expected, "vectors": None}
        assert len(row["vectors"]) == len(expected["vectors"])
        for mine, its in zip(row["vectors"], expected["vectors"], strict=True):
            np.testing.assert_allclose(np.array(mine, np.float32), np.array(its, np.float32), atol=2e-3)


def test_a_block_without_a_single_image(job, listed):
    nothing = listed.filter(pc.is_in(listed["size_bytes"], pa.array([0, 6])))
    encoded = EncodeImages(job, 1)(read_block(nothing, job=job))
    assert [len(vectors) for vectors in encoded["vectors"].to_pylist()] == [0] * nothing.num_rows
    written = write_block(encoded, job=job)
    assert written["stored"][0].as_py() == written["quarantined"][0].as_py() == nothing.num_rows == 2
    empty = write_block(EncodeImages(job, 1)(read_block(listed.slice(3, 2), job=job)), job=job)
    assert (empty["fragments"][0].as_py(), empty["gone"][0].as_py(), empty["changed"][0].as_py()) == (
        [],
        1,
        1,
    )


def test_slots_that_say_the_same_are_stored_once(job, listed):
    """What the encoder says not to keep is not kept, and what is not finite is quarantined."""

    class Fixed:
        def encode(self, pixels: torch.Tensor) -> Encoded:
            count = len(pixels)
            vectors = torch.eye(4, 32).expand(count, 4, 32).clone()
            vectors[-1] = torch.nan
            boxes = torch.tensor([0.0, 0.0, 0.5, 1.0]).expand(count, 4, 4)
            return Encoded(vectors, boxes, torch.tensor([True, False, True, False]).expand(count, 4))

    actor = EncodeImages(job, 1)
    actor._encoder = Fixed()
    encoded = actor(read_block(listed, job=job))
    vectors = [np.array(each.as_py(), np.float32) for each in encoded["vectors"]]
    assert [len(each) for each in vectors] == [2, 2, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(vectors[0], np.eye(4, 32)[[0, 2]])
    assert encoded["boxes"][1].as_py() == [[0, 0, 128, 255]] * 2
    assert encoded["error"][2].as_py() == "the encoder gives no finite vector for this image"


@pytest.mark.parametrize(
    ("size", "batch_size", "num_images", "num_actors", "expected"),
    [
        (448, 64, 10**6, 8, 64),  # 83 images are 48 MB: one batch of 64
        (64, 16, 10**6, 8, 4096),  # 4,096 small ones
        (64, 16, 640, 2, 80),  # four blocks for each actor
        (64, 16, 10, 2, 16),  # never less than a batch
        (4096, 64, 10**6, 8, 64),
    ],
)
def test_blocks_are_whole_batches(job, size, batch_size, num_images, num_actors, expected):
    import dataclasses

    job = dataclasses.replace(job, image_size=size, batch_size=batch_size)
    assert job.block_rows(num_images, num_actors) == expected


def test_fragments_are_few_for_many_and_early_for_few(job):
    import dataclasses

    assert job.fragment_rows(100) == 256
    assert job.fragment_rows(200_000) == 1000
    assert job.fragment_rows(10**8) == 8192
    large = dataclasses.replace(job, num_slots=50, dim=1024)
    assert large.fragment_rows(10**8) == 1310  # 128 MB of vectors
