"""A random encoder, an index that is made with it, and torch on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from for_ray.model.bundle import Bundle
from tests.planted import PlantedIndex, make_tiny_bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("tiny-clip"))


@pytest.fixture
def planted_index(tmp_path: Path, tiny_bundle: Bundle) -> PlantedIndex:
    """An index without images, its encoder saved."""
    return PlantedIndex.make(tmp_path / "index", tiny_bundle)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine several threads wait for each other far longer than they compute a tiny batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
