"""The default encoder as it ships: small, and good enough to search the picture book with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from for_ray.datasets.captioned import KINDS, draw_scene, paint_backdrops, training_names
from for_ray.datasets.picturebook import write_picturebook
from for_ray.evaluation.ranking import map_at_k
from for_ray.model.bundle import open_bundle
from for_ray.model.encoder import Encoder, load_encoder
from for_ray.model.preprocess import decode

NUM_SCENES = 128
NUM_PAGES = 200
LEAST_TOP1 = 0.5


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("picturebook") / "val"
    write_picturebook(folder, images=NUM_PAGES, split="val", seed=1)
    return folder


def test_the_bundle_is_small_and_pinned() -> None:
    folder = resources.files("for_ray.model") / "assets/picturebook"
    held = {each.name: each.read_bytes() for each in folder.iterdir()}
    assert set(held) == {"encoder.toml", "model.json", "weights.safetensors"}
    assert sum(map(len, held.values())) <= 10_000_000
    bundle = open_bundle("picturebook")
    assert bundle.config.head == "cluster"
    assert bundle.config.weights_sha256 == hashlib.sha256(held["weights.safetensors"]).hexdigest()


def test_it_tells_300_names_apart_on_scenes_of_its_training_style() -> None:
    """`benchmarks/zero_shot.py` measures the whole; chance is 0.003."""
    encoder = load_encoder(open_bundle("picturebook", head="clip"), "cpu")
    rng = np.random.default_rng(5)
    style = dataclasses.replace(KINDS["large"].style, sizes=(0.15, 0.4))
    kind, backdrops = dataclasses.replace(KINDS["large"], style=style), paint_backdrops(rng, 20)
    wanted = rng.permutation(len(training_names()))[:NUM_SCENES]
    scenes = np.stack([draw_scene(rng, kind, backdrops, only=int(name)).pixels for name in wanted])
    vectors = encoder.encode(np.ascontiguousarray(scenes.transpose(0, 3, 1, 2))).vectors[:, 0]
    answers = (vectors.cpu().numpy() @ encoder.embed_text(training_names()).T).argmax(1)
    assert float((answers == wanted).mean()) >= LEAST_TOP1


def test_clusters_find_what_the_whole_image_hides(pages: Path) -> None:
    coco = json.loads((pages / "annotations.json").read_text(encoding="utf-8"))
    names = [category["name"] for category in coco["categories"]]
    relevant = np.zeros((len(names), NUM_PAGES), bool)
    for annotation in coco["annotations"]:
        relevant[annotation["category_id"] - 1, annotation["image_id"] - 1] = True
    found = {}
    for head in ("clip", "cluster"):
        encoder = load_encoder(open_bundle("picturebook", head=head), "cpu")
        found[head] = map_at_k(best_scores(encoder, names, pages), relevant, 50)
    assert found["clip"] >= 0.05  # a random order has 0.01; the figure of `benchmarks/heads.py` is for 5,000
    assert found["cluster"] >= found["clip"] + 0.05


def best_scores(encoder: Encoder, names: list[str], pages: Path) -> NDArray[np.float32]:
    """The highest cosine over the stored slots, for each name and page [V, B]."""
    size, mode = encoder.image_size, encoder.bundle.config.resize_mode
    files = sorted((pages / "images").iterdir())
    pixels = np.stack([decode(f.read_bytes(), image_size=size, resize_mode=mode).pixels for f in files])
    encoded = encoder.encode(pixels)
    cosines = torch.einsum("vd,bnd->vbn", torch.from_numpy(encoder.embed_text(names)), encoded.vectors.cpu())
    scores: NDArray[np.float32] = cosines.masked_fill(~encoded.keep.cpu(), -1).amax(2).numpy()
    return scores
