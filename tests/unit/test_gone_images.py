"""What a dry run says of a run that would be refused: images are gone, or in quarantine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from for_ray.config import IndexSettings
from for_ray.pipeline.index import run_index
from for_ray.stages.progress import Progress
from for_ray.storage import stat
from tests.planted import Planted, PlantedIndex

REFUSAL = "a run would be refused: 30 of the 30 images that the index holds are gone (100.0%)"


def test_rows_of_an_encoder_that_never_published_are_not_missed(
    planted_index: PlantedIndex, tmp_path: Path
) -> None:
    """A first run that was stopped had a wrong prefix: the next one, with the right one, is not refused."""
    vectors = np.eye(planted_index.bundle.dim)[:1]
    planted_index.add([Planted(f"/wrong/{row}.jpg", vectors) for row in range(30)])
    images = tmp_path / "images"
    images.mkdir()
    for row in range(2):
        (images / f"{row}.jpg").touch()

    def told() -> str:
        bundle = planted_index.layout.bundle_uri(planted_index.bundle.fingerprint)
        settings = IndexSettings(images=str(images), index=planted_index.uri, encoder=bundle, dry_run=True)
        return run_index(settings, progress=Progress(is_quiet=True)).message

    assert told() == "dry run: 2 images would be encoded, 30 rows deleted; nothing was written"
    planted_index.publish()
    assert REFUSAL in told()


def test_quarantined_images_that_would_end_a_run_are_told_before_it(
    planted_index: PlantedIndex, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for row in range(10):
        (images / f"{row}.jpg").write_bytes(b"no image")
    listed = [stat(str(images / f"{row}.jpg")) for row in range(10)]
    nothing = np.empty((0, planted_index.bundle.dim))
    bad = [Planted(each.uri, nothing, etag=each.etag, error="broken JPEG") for each in listed[:3]]
    good = Planted(listed[3].uri, np.eye(planted_index.bundle.dim)[:1], etag=listed[3].etag)
    planted_index.add([*bad, good])
    bundle = planted_index.layout.bundle_uri(planted_index.bundle.fingerprint)

    def told(most: float) -> str:
        given = {"images": str(images), "index": planted_index.uri, "encoder": bundle, "dry_run": True}
        settings = IndexSettings(**given, max_bad_fraction=most)
        return run_index(settings, progress=Progress(is_quiet=True)).message

    looked = "dry run: 6 images would be encoded, 0 rows deleted; nothing was written"
    assert told(0.3) == looked
    assert told(0.2) == (
        f"{looked}; a run would publish nothing: 3 images are in quarantine, more than max_bad_fraction 0.2 "
        "allows"
    )
