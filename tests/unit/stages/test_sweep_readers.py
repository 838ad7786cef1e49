"""Searches from another process while sweeps and compactions run, on disk."""

from __future__ import annotations

from pathlib import Path

import lance

from for_ray.index import snapshots
from tests.planted import PlantedIndex
from tests.readers import KEPT, live_nights_beside_a_reader


def test_searches_go_on_while_an_index_is_swept(planted_index: PlantedIndex, tmp_path: Path) -> None:
    assert live_nights_beside_a_reader(planted_index, tmp_path, num_nights=12) >= 25
    assert [each.snapshot_id for each in snapshots.list_published(planted_index.layout)] == [13, 14, 15, 16]
    # What was swept meanwhile: segments and versions of eleven nights.
    folder = planted_index.segment_path("")
    names = {f"segment-{number}.faiss" for number in range(10, 16)}
    assert {path.name for path in folder.iterdir() if path.name.startswith("segment")} == names
    assert len(lance.dataset(planted_index.images_uri).versions()) == KEPT
