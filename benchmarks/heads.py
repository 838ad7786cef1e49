"""mAP@50 of the heads that need no training, on the picture book's val split.

    python benchmarks/heads.py [--images 5000] [--encoder picturebook] [--json]

Every annotated category is a query (the encoder's prompt ensemble); images are ranked by the highest cosine
over their vectors, by comparison with all of them: no index, no codec. A head whose equal-saying slots are
stored once has a second line, for all of its slots.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from for_ray.evaluation.ranking import average_precisions_at_k
from for_ray.model.bundle import open_bundle
from for_ray.model.encoder import Encoder, load_encoder
from for_ray.model.preprocess import decode

HEADS = ("clip", "dense", "cluster")
BATCH = 64


class ValSplit(NamedTuple):
    """Image files [B], category names [V], whether each is novel [V], and which images show it [V, B]."""

    paths: list[Path]
    names: list[str]
    is_novel: NDArray[np.bool_]
    relevant: NDArray[np.bool_]


def draw_val_split(folder: Path, num_images: int, *, split: str = "val", seed: int | None = None) -> ValSplit:
    """Draw the data set, or its other split, into an empty folder and read its annotations."""
    module = [sys.executable, "-m", "for_ray.datasets.picturebook"]
    wanted = ["--out", str(folder), "--images", str(num_images), "--split", split]
    wanted += [] if seed is None else ["--seed", str(seed)]
    subprocess.run([*module, *wanted], check=True, stdout=sys.stderr)
    coco = json.loads((folder / "annotations.json").read_text("utf-8"))
    row = {category["id"]: position for position, category in enumerate(coco["categories"])}
    column = {image["id"]: position for position, image in enumerate(coco["images"])}
    relevant = np.zeros((len(row), len(column)), bool)
    for annotation in coco["annotations"]:
        relevant[row[annotation["category_id"]], column[annotation["image_id"]]] = True
    return ValSplit(
        [folder / "images" / image["file_name"] for image in coco["images"]],
        [category["name"] for category in coco["categories"]],
        np.array([category["supercategory"] == "novel" for category in coco["categories"]]),
        relevant,
    )


def read_batches(paths: list[Path], encoder: Encoder) -> Iterator[torch.Tensor]:
    """The images as uint8 [B, 3, H, W], decoded by threads, in their order."""
    config = encoder.bundle.config

    def read(path: Path) -> torch.Tensor:
        decoded = decode(
            path.read_bytes(),
            image_size=config.image_size,
            resize_mode=config.resize_mode,
            interpolation=config.interpolation,
        )
        return torch.from_numpy(decoded.pixels)

    with ThreadPoolExecutor(2) as readers:
        for start in range(0, len(paths), BATCH):
            yield torch.stack(list(readers.map(read, paths[start : start + BATCH])))


def measure(encoder: Encoder, val: ValSplit) -> list[dict[str, Any]]:
    """One line for what is stored and, where that is less, one for all slots."""
    queries = torch.from_numpy(encoder.embed_text(val.names))  # [V, D]
    stored, every, num_stored = [], [], 0
    for pixels in read_batches(val.paths, encoder):
        vectors, _, keep = (part.cpu() for part in encoder.encode(pixels))
        scores = torch.einsum("vd,bnd->vbn", queries, vectors.float())
        every.append(scores.amax(dim=2))
        stored.append(scores.masked_fill(~keep, -torch.inf).amax(dim=2))
        num_stored += int(keep.sum())
    lines = [(num_stored / len(val.paths), "stored", stored), (float(keep.shape[1]), "all slots", every)]
    if num_stored == len(val.paths) * keep.shape[1]:
        del lines[1]
    return [
        {"vectors": which, "vectors_per_image": round(number, 2), **summarise(torch.cat(parts, dim=1), val)}
        for number, which, parts in lines
    ]


def summarise(scores: torch.Tensor, val: ValSplit) -> dict[str, float]:
    """mAP@50 over the base, novel and all categories; scores [V, B]."""
    precisions = average_precisions_at_k(scores.numpy(), val.relevant, 50)
    groups = {"base": ~val.is_novel, "novel": val.is_novel, "all": np.ones(len(val.names), bool)}
    return {
        f"map_at_50_{name}": round(float(np.nanmean(precisions[chosen])), 4)
        for name, chosen in groups.items()
    }


def print_table(lines: list[dict[str, Any]], num_images: int) -> None:
    """As Markdown, so that it can stand in README."""
    print(f"{num_images} images of the val split, mAP@50\n")
    print("| head | vectors an image | base | novel | all |\n| --- | --- | --- | --- | --- |")
    for line in lines:
        scores = " | ".join(f"{line[f'map_at_50_{group}']:.3f}" for group in ("base", "novel", "all"))
        number = f"{line['vectors_per_image']:.4g} ({line['vectors']})"
        print(f"| {line['head']} | {number} | {scores} |")


def main() -> int:
    """Draw, encode with each head, rank, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000, help="images to draw (default 5000)")
    parser.add_argument("--encoder", default="picturebook", help="a bundle or open_clip:MODEL@PRETRAINED")
    parser.add_argument("--heads", nargs="+", default=HEADS, choices=HEADS, help="which to measure")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        val = draw_val_split(Path(folder), options.images)
        lines = []
        for head in options.heads:
            encoder = load_encoder(open_bundle(options.encoder, head=head))
            lines += [{"head": head, **line} for line in measure(encoder, val)]
    if options.json:
        print(json.dumps({"images": options.images, "encoder": options.encoder, "results": lines}))
    else:
        print_table(lines, options.images)
    return 0


if __name__ == "__main__":
    sys.exit(main())
