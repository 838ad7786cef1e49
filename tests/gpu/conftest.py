"""Each test here runs on the CPU, which shows that the test is right, and on a GPU where there is one.

    pytest tests/gpu -m gpu        on a machine with a GPU: torch with CUDA, and faiss-gpu

What a GPU gives is held against the CPU's. Where none is, its half is skipped, and says why.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import pytest
import torch

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in ("device", "faiss_device"):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, ["cpu", GPU], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where torch computes."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no GPU (torch.cuda.is_available() is False)")
    return str(request.param)


class StandIn:
    """What faiss-gpu has and faiss-cpu has not; "on the GPU" is the index itself."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.options: list[SimpleNamespace] = []

    def get_num_gpus(self) -> int:
        return 1

    def make_options(self) -> SimpleNamespace:
        self.options.append(SimpleNamespace(useFloat16=False))
        return self.options[-1]

    def to_all_gpus(self, index: Any, co: Any = None, ngpu: int = -1) -> Any:
        assert co in self.options
        self.given.append(index)
        return index


@pytest.fixture
def faiss_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandIn | None:
    """FAISS's GPUs, or what stands in for them, so that the code's own path to them is walked in any case."""
    if request.param == "cuda":
        if not faiss.get_num_gpus():
            pytest.skip(
                f"faiss {faiss.__version__} finds no GPU (faiss.get_num_gpus() is 0); is it faiss-gpu?"
            )
        return None
    stand_in = StandIn()
    monkeypatch.setattr(faiss, "get_num_gpus", stand_in.get_num_gpus)
    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", stand_in.make_options, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", stand_in.to_all_gpus)
    return stand_in


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16 drawn images."""
    from for_ray.datasets.picturebook import write_picturebook

    return (
        write_picturebook(tmp_path_factory.mktemp("book") / "val", images=16, split="val").parent / "images"
    )
