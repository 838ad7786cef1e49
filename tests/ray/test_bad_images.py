"""The index job on a folder with every kind of file and every odd name: counts, reasons, vectors."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

from for_ray.config import IndexSettings
from for_ray.index import snapshots, table
from for_ray.model.bundle import open_bundle
from for_ray.model.encoder import load_encoder
from for_ray.pipeline.index import run_index
from for_ray.schema import Layout
from for_ray.stages.progress import Progress
from for_ray.stages.report import IndexSummary
from tests.bad_images import bad_kinds, good_kinds, make_kinds, picture, plain_pixels, saved
from tests.odd_keys import HIDDEN_KEYS, ODD_KEYS, key_image, put_keys

HEAD = {"head": "dense", "keep_threshold": 1.0}
NUM_GOOD, NUM_BAD = len(good_kinds()) + len(ODD_KEYS), len(bad_kinds())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds in `images/kinds`, all keys in `images/keys`, and links that lead to nothing new."""
    home = tmp_path_factory.mktemp("home")
    kinds = home / "images" / "kinds"
    kinds.mkdir(parents=True)
    for kind in make_kinds():
        (kinds / kind.name).write_bytes(kind.raw)
    put_keys(str(home / "images" / "keys"), ODD_KEYS)
    (kinds / "to-nothing.jpg").symlink_to(home / "nothing.jpg")
    (kinds / "to-itself.jpg").symlink_to(kinds / "to-itself.jpg")
    (kinds / "to-a-folder.jpg").symlink_to(kinds)
    return home


@pytest.fixture(scope="module")
def first_run(ray_address: str, encoder_name: str, home: Path) -> IndexSummary:
    return run(home, encoder_name)


def run(home: Path, encoder_name: str) -> IndexSummary:
    settings = IndexSettings(
        images=str(home / "images"),
        index=str(home / "index"),
        encoder=encoder_name,
        batch_size=16,
        max_actors=1,
        max_bad_fraction=0.5,
        **HEAD,
    )
    return run_index(settings, progress=Progress(is_quiet=True))


def open_images(home: Path) -> Any:
    layout = Layout(str(home / "index"))
    snapshot = snapshots.latest(layout)
    return lance.dataset(layout.images_uri(snapshot.fingerprint), version=snapshot.images_version)


def rows_of(home: Path) -> dict[str, dict[str, Any]]:
    """The published rows by what follows `images/`."""
    rows = open_images(home).to_table().to_pylist()
    by_name = {row["uri"].removeprefix(f"{home}/images/"): row for row in rows}
    assert len(by_name) == len(rows)
    return by_name


def test_every_file_is_indexed_or_quarantined_once(first_run, home):
    assert (first_run.listed, first_run.new) == (NUM_GOOD + NUM_BAD,) * 2
    assert (first_run.indexed, first_run.quarantined) == (NUM_GOOD, NUM_BAD)
    names = {f"kinds/{kind.name}" for kind in make_kinds()} | {f"keys/{key}" for key in ODD_KEYS}
    rows = rows_of(home)
    assert rows.keys() == names
    assert not [key for key in HIDDEN_KEYS if f"keys/{key}" in rows]
    assert first_run.vectors == sum(len(row["vectors"] or []) for row in rows.values()) == 4 * NUM_GOOD


def test_every_reason_names_its_cause(first_run, home):
    rows = rows_of(home)
    for kind in bad_kinds():
        row = rows[f"kinds/{kind.name}"]
        assert re.search(kind.cause, row["error"]), (kind.name, row["error"])
        assert not row["vectors"]
        assert row["width"] is None
    num_errors = sum(row["error"] is not None for row in rows.values())
    assert num_errors == NUM_BAD


def test_causes_are_counted_with_examples(first_run, home):
    causes = table.worst_causes(open_images(home), num_examples=2)
    counts = {cause.cause: cause.count for cause in causes}
    assert sum(counts.values()) == NUM_BAD
    expected = Counter(kind.cause for kind in bad_kinds())
    num_bombs = sum(count for cause, count in expected.items() if cause.startswith("^too many pixels"))
    num_others = sum(count for cause, count in expected.items() if cause.startswith("not an image"))
    assert (counts["too many pixels"], counts["not an image"]) == (num_bombs, num_others)
    assert len(counts) < NUM_BAD // 2 + 2  # sizes, offsets and names do not split them
    assert all(len(cause.examples) == min(cause.count, 2) for cause in causes)


def test_vectors_are_those_of_the_bare_encoder_on_a_plain_decode(first_run, home, encoder_name):
    bundle = open_bundle(encoder_name, **HEAD)
    pictures = {f"kinds/{kind.name}": kind.reference for kind in good_kinds()}
    pictures |= {f"keys/{key}": picture(seed=number + 1) for number, key in enumerate(ODD_KEYS)}
    pixels = [plain_pixels(each, bundle.image_size, bundle.resize_mode) for each in pictures.values()]
    encoded = load_encoder(bundle, "cpu").encode(np.stack(pixels)).vectors.numpy()
    rows = rows_of(home)
    for name, picture_, expected in zip(pictures, pictures.values(), encoded, strict=True):
        row = rows[name]
        assert (row["height"], row["width"]) == picture_.shape[:2], name
        # A strip is cut before it is resized: close, but not to the last bit.
        most = 2e-2 if "strip" in name else 2e-3
        np.testing.assert_allclose(np.array(row["vectors"], np.float32), expected, atol=most, err_msg=name)


def test_later_runs_encode_what_has_changed_and_nothing_else(first_run, home, encoder_name):
    """Quarantined files are tried again when their etag changes: one becomes good, one stays bad."""
    again = run(home, encoder_name)
    assert again.message.startswith("nothing changed; snapshot 1 stays; 4 objects are no images")
    assert (again.new, again.changed, again.gone, again.unchanged) == (0, 0, 0, NUM_GOOD + NUM_BAD)
    before = rows_of(home)
    kinds = home / "images" / "kinds"
    (kinds / "cut.png").write_bytes(key_image(0))
    (kinds / "words.jpg").write_bytes(b"other words")
    (kinds / "rgb.png").write_bytes(saved(picture(), "PNG")[:300])  # and a good one is cut
    third = run(home, encoder_name)
    assert (third.new, third.changed, third.gone, third.unchanged) == (0, 3, 0, NUM_GOOD + NUM_BAD - 3)
    assert (third.indexed, third.quarantined, third.snapshot) == (NUM_GOOD, NUM_BAD, 2)
    rows = rows_of(home)
    assert rows["kinds/cut.png"]["error"] is None
    np.testing.assert_array_equal(rows["kinds/cut.png"]["vectors"], rows[f"keys/{ODD_KEYS[0]}"]["vectors"])
    assert rows["kinds/words.jpg"]["error"] == "not an image: begins with other wo"
    assert rows["kinds/rgb.png"]["error"].startswith("broken PNG: ")
    untouched = rows.keys() - {"kinds/cut.png", "kinds/words.jpg", "kinds/rgb.png"}
    assert {name: rows[name] for name in untouched} == {name: before[name] for name in untouched}
