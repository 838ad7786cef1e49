"""Which of an index's images the job misses before it writes: those that searches may find."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from for_ray.config import IndexSettings
from for_ray.pipeline.index import run_index
from for_ray.stages.progress import Progress
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
