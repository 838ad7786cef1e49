"""A random encoder, and an index that is made with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from for_ray.model.bundle import Bundle
from tests.planted import PlantedIndex, make_tiny_bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("tiny-clip"))


@pytest.fixture
def planted_index(tmp_path: Path, tiny_bundle: Bundle) -> PlantedIndex:
    """An index without images, its encoder saved."""
    return PlantedIndex.make(tmp_path / "index", tiny_bundle)
