"""Zero-shot top-1 of the picture book's encoder on scenes of the families that it was trained on.

    python benchmarks/zero_shot.py [--bundle FOLDER] [--scenes 5]

Each scene, 192 × 192 pixels, shows one object in the training's wildest style. All names that the training
families draw are candidates, each through the encoder's own prompts; the nearest to CLIP's image embedding
is the answer. The model saw these drawings, but not these scenes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

import numpy as np
import torch

from for_ray.datasets.captioned import KINDS, SceneKind, draw_scene, paint_backdrops, training_names
from for_ray.errors import ForRayError
from for_ray.model.bundle import open_bundle
from for_ray.model.encoder import Encoder, load_encoder

SIZES = ((0.15, 0.4), (0.2, 0.6))  # the object's longer side, as a fraction of the scene's
BATCH = 64


def scenes_with_sizes(sizes: tuple[float, float]) -> SceneKind:
    """The training's large scenes, their objects in a range of sizes."""
    kind = KINDS["large"]
    return dataclasses.replace(kind, style=dataclasses.replace(kind.style, sizes=sizes))


def top1(encoder: Encoder, sizes: tuple[float, float], *, scenes_per_name: int, seed: int = 99) -> float:
    """How often the right name is nearest; each name comes as often as the others."""
    names, kind = training_names(), scenes_with_sizes(sizes)
    rng = np.random.default_rng(seed)
    backdrops = paint_backdrops(rng, 100)
    queries = torch.from_numpy(encoder.embed_text(names))  # [V, D]
    wanted = list(range(len(names))) * scenes_per_name
    num_right = 0
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        scenes = [draw_scene(rng, kind, backdrops, only=name).pixels for name in part]
        pixels = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).contiguous()
        vectors = encoder.encode(pixels).vectors[:, 0].cpu().float()  # [B, 1, D] -> [B, D]
        num_right += int(((vectors @ queries.T).argmax(1) == torch.tensor(part)).sum())
    return num_right / len(wanted)


def main() -> int:
    """Draw, encode, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", default="picturebook", help="another bundle's folder; 192 px input")
    parser.add_argument("--scenes", type=int, default=5, help="scenes of each name (default 5)")
    options = parser.parse_args()
    try:
        encoder = load_encoder(open_bundle(options.bundle, head="clip"))
        num_names = len(training_names())
    except ForRayError as error:
        print(f"zero_shot: {error}", file=sys.stderr)
        return 2
    print(f"{num_names} names, {num_names * options.scenes} scenes with one object each\n")
    print("| object's longer side / the scene's | top-1 |\n| --- | --- |")
    for low, high in SIZES:
        print(f"| {low}–{high} | {top1(encoder, (low, high), scenes_per_name=options.scenes):.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
