"""What the labelling actor does with a block, against the model's own functions, image by image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.numpy import save

from for_ray.index import table
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.model.encoder import Encoder, load_encoder
from for_ray.model.preprocess import decode
from for_ray.model.pseudo_labels import label_images
from for_ray.schema import LISTING_SCHEMA, LabelLayout, LabelRun, labels_schema
from for_ray.stages.blocks import EncodeCounts, write_block
from for_ray.stages.label import NOT_FINITE, LabelImages, LabelJob, _embed
from for_ray.stages.reading import read_block
from for_ray.storage import stat, write_bytes
from tests.planted import make_tiny_bundle

NAMES = ["dog", "cat", "red kite", "lamp", "sofa", "tower", "orange"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("label-encoder")
    tiny = make_tiny_bundle(folder)
    tiny.save(str(folder / "bundle"))
    return open_bundle(str(folder / "bundle"), head="cluster", num_slots=3, allow_untrained=True)


@pytest.fixture(scope="module")
def encoder(bundle: Bundle) -> Encoder:
    return load_encoder(bundle, "cpu")


def make_job(folder: Path, bundle: Bundle, encoder: Encoder, **changes: object) -> LabelJob:
    layout = LabelLayout(str(folder / "labels"))
    size = bundle.image_size
    features = encoder.features(torch.zeros((1, 3, size, size), dtype=torch.uint8))
    given = {
        "dataset": "few",
        "images_uri": str(folder),
        "encoder": bundle.name,
        "fingerprint": bundle.fingerprint,
        "backbone_fingerprint": bundle.backbone_fingerprint,
        "text_fingerprint": bundle.text_fingerprint,
        "head": "cluster",
        "num_slots": bundle.num_slots,
        "vocabulary": "names",
        "vocabulary_sha256": "0" * 64,
        "num_names": len(NAMES),
        "exclude_novel": False,
        "dropped_names": (),
        "threshold": 0.14,  # one in seven: some names of some images are above it
        "num_labels": 4,
        "logit_scale": encoder.logit_scale,
        "has_features": True,
        "num_prefix": features.prefix.shape[1],
        "height": features.height,
        "width": features.width,
        "channels": features.cells.shape[2],
    }
    run = LabelRun(**{**given, **changes})
    bundle.save(layout.bundle_uri)
    write_bytes(layout.text_uri, save({"text": encoder.embed_text(NAMES)}))
    images = table.create_table(layout.table_uri, labels_schema(run))
    return LabelJob.of(
        bundle,
        layout.bundle_uri,
        images,
        run=run,
        text_uri=layout.text_uri,
        device="cpu",
        batch_size=2,
        read_threads=2,
    )


@pytest.fixture
def listed(tmp_path: Path) -> pa.Table:
    """Six rows: good, broken, good, gone, good, empty."""
    entries = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        raw = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 255, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((50, 40)).save(raw, "png")
        path.write_bytes({1: b"<html>", 5: b""}.get(number, raw.getvalue()))
        entries.append(stat(str(path)))
    (tmp_path / "3.png").unlink()
    return pa.table([list(column) for column in zip(*entries, strict=True)], schema=LISTING_SCHEMA)


def rows_of(job: LabelJob, block: pa.Table) -> dict[str, dict[str, object]]:
    """What the actor and the writer make of a block, by file name."""
    written = write_block(LabelImages(job, 1)(read_block(block, job=job)), job=job)
    images = table.append(table.require_table(job.table_uri), written["fragments"][0].as_py())
    counts = EncodeCounts(*(written[name][0].as_py() for name in EncodeCounts._fields))
    assert counts.total == block.num_rows
    return {Path(row["uri"]).stem: row for row in images.to_table().to_pylist()}


def test_rows_hold_what_the_model_says_of_each_image(tmp_path, bundle, encoder, listed):
    job = make_job(tmp_path, bundle, encoder)
    rows = rows_of(job, listed)
    assert sorted(rows) == list("01245")
    text = torch.from_numpy(encoder.embed_text(NAMES))
    num_labels = 0
    for name in "024":
        decoded = decode(
            (tmp_path / f"{name}.png").read_bytes(),
            image_size=bundle.image_size,
            resize_mode=bundle.resize_mode,
            interpolation=bundle.config.interpolation,
        )
        pixels = torch.from_numpy(decoded.pixels[None])
        features = encoder.features(pixels)
        tokens = torch.cat([features.prefix, features.cells], dim=1)[0]
        held = np.array(rows[name]["features"], np.float16).reshape(tokens.shape)
        np.testing.assert_allclose(held, tokens.half().numpy(), atol=2e-3)
        vectors = encoder.encode(pixels).vectors
        expected = label_images(vectors, text, logit_scale=encoder.logit_scale, threshold=0.14, most=4)
        is_label = expected.labels[0] >= 0
        assert rows[name]["labels"] == expected.labels[0][is_label].tolist()
        np.testing.assert_allclose(
            rows[name]["probabilities"], expected.probabilities[0][is_label].numpy(), atol=1e-4
        )
        num_labels += len(rows[name]["labels"])
        assert (rows[name]["error"], rows[name]["width"], rows[name]["height"]) == (None, 50, 40)
    assert num_labels > 0
    for name in "15":
        assert rows[name]["error"]
        assert (rows[name]["labels"], rows[name]["probabilities"], rows[name]["features"]) == ([], [], None)


def test_blocks_make_no_difference(tmp_path, bundle, encoder, listed):
    job = make_job(tmp_path, bundle, encoder)
    actor = LabelImages(job, 1)
    whole = actor(read_block(listed, job=job)).sort_by("uri").to_pylist()
    parts = [actor(read_block(listed.slice(row, 1), job=job)) for row in range(listed.num_rows)]
    single = pa.concat_tables(parts).sort_by("uri").to_pylist()
    for one, other in zip(whole, single, strict=True):
        assert (one["uri"], one["error"], one["status"], one["labels"]) == (
            *(other["uri"], other["error"], other["status"], other["labels"]),
        )
        if one["features"] is None:
            assert other["features"] is None
        else:
            np.testing.assert_allclose(one["features"], other["features"], atol=2e-3)


def test_without_features_there_is_no_such_column(tmp_path, bundle, encoder, listed):
    job = make_job(tmp_path, bundle, encoder, has_features=False)
    rows = rows_of(job, listed)
    assert all("features" not in row for row in rows.values())
    assert any(row["labels"] for row in rows.values())
    assert job.row_bytes == 8 * 4


def test_a_threshold_that_nothing_passes_leaves_lists_empty(tmp_path, bundle, encoder, listed):
    rows = rows_of(make_job(tmp_path, bundle, encoder, threshold=0.999), listed)
    assert [rows[name]["labels"] for name in "024"] == [[], [], []]
    assert all(rows[name]["error"] is None and rows[name]["features"] for name in "024")


def test_an_image_of_which_nothing_finite_comes_is_quarantined(tmp_path, bundle, encoder, listed):
    job = make_job(tmp_path, bundle, encoder)
    actor = LabelImages(job, 1)
    encode = actor._encoder.encode_with_features

    def overflow(pixels: torch.Tensor) -> object:
        encoded, features = encode(pixels)
        features.cells[0, 0, 0] = 1e6  # more than float16 holds
        return encoded, features

    actor._encoder.encode_with_features = overflow
    block = actor(read_block(listed.slice(0, 1), job=job))
    row = block.to_pylist()[0]
    assert (row["error"], row["labels"], row["probabilities"], row["features"]) == (NOT_FINITE, [], [], None)


def test_what_is_too_large_for_features_is_labelled_all_the_same_without_them(
    tmp_path, bundle, encoder, listed
):
    job = make_job(tmp_path, bundle, encoder, has_features=False)
    actor = LabelImages(job, 1)
    encode = actor._encoder.encode_with_features

    def overflow(pixels: torch.Tensor) -> object:
        encoded, features = encode(pixels)
        features.cells[0, 0, 0] = 1e6
        return encoded, features

    actor._encoder.encode_with_features = overflow
    row = actor(read_block(listed.slice(0, 1), job=job)).to_pylist()[0]
    assert row["error"] is None
    assert row["labels"]


def test_large_rows_make_small_fragments(tmp_path, bundle, encoder):
    job = make_job(tmp_path, bundle, encoder, num_prefix=1, height=14, width=14, channels=4096)
    assert job.fragment_rows(10**6) == 83  # 128 MB of features


def test_a_vocabulary_is_embedded_with_what_must_be_known_of_the_encoder(tmp_path, bundle, encoder):
    bundle.save(str(tmp_path / "bundle"))
    embedded = _embed(str(tmp_path / "bundle"), NAMES, "cpu", 1)
    np.testing.assert_allclose(embedded.text, encoder.embed_text(NAMES), atol=1e-5)
    assert embedded.logit_scale == pytest.approx(encoder.logit_scale)
    size = bundle.image_size
    features = encoder.features(torch.zeros((1, 3, size, size), dtype=torch.uint8))
    assert features.cells.shape[1:] == (embedded.height * embedded.width, embedded.channels)
    assert features.prefix.shape[1] == embedded.num_prefix
