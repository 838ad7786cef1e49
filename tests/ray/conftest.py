"""One local Ray for the tests here, with two GPUs in its books, and a tiny encoder with random weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A cluster that this process has joined; others join it by the address."""
    import ray

    from for_ray.stages.cluster import leave_own

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray.get_runtime_context().gcs_address
    leave_own()


@pytest.fixture(scope="session")
def encoder_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `--encoder` takes: a ResNet with attention pooling, random weights in a file."""
    import torch
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("encoder")
    (folder / "model.json").write_text(json.dumps(MODEL))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = CLIP(**MODEL).state_dict()
    save_file({name: weight.contiguous() for name, weight in state.items()}, folder / "weights.safetensors")
    return f"open_clip:{folder}/model.json@{folder}/weights.safetensors"


@pytest.fixture(scope="session")
def draw() -> Callable[..., None]:
    """Writes pictures of coloured fields: `draw(folder, range(60))`; another seed gives other pictures."""

    def write(folder: Path, numbers: range, *, seed: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number in numbers:
            fields = np.random.default_rng([seed, number]).integers(0, 255, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(fields).resize((120, 100)).save(folder / f"{number:05d}.jpg", quality=90)

    return write
