"""What training costs, in ratios of one run: features against images, matching, head against head.

    OMP_NUM_THREADS=1 python benchmarks/train.py [--images 384] [--runs 5] [--folder KEPT] [--json]

Epochs    one of head training from cached features, and the same from images, on the picture book
Matching  its share of a training step (forward, both losses, backward, Adam), there and on random features
Heads     SUM-CLIP's against Cluster-CLIP's with scikit-learn's k-means (one fit an image) and with our own

One process, without Ray but for the labels; `head_to_head.py` says how it is timed. Random features scatter
around 30 directions an image; a step on them has 3 of 48 labels an image, and pseudo-labels as asked for.
Threads that share cores with other programs wait for each other: take as many as there are idle cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.functional import normalize

from for_ray.config import FinetuneSettings, LabelSettings
from for_ray.datasets.captioned import training_names
from for_ray.datasets.picturebook import write_picturebook
from for_ray.errors import ForRayError
from for_ray.index.table import require_table, take_rows
from for_ray.model import set_loss
from for_ray.model.backbone import Features
from for_ray.model.finetuning import AdamSettings, Finetuner
from for_ray.model.matching import match
from for_ray.model.objectives import LossLabels, LossName, LossSettings, Objective
from for_ray.model.slot_model import SlotModel, as_features
from for_ray.pipeline.finetune import make_job
from for_ray.pipeline.label import run_label
from for_ray.stages.progress import Progress
from for_ray.stages.training_images import BatchReader
from for_ray.stages.training_job import FinetuneJob
from for_ray.stages.training_run import TrainingRun

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder alone

from benchmarks.head_to_head import (
    Figures,
    Stopwatch,
    at_papers_size,
    compare_heads,
    random_cells,
    random_slots,
    ratio,
    take_turns,
)

THRESHOLD = 0.2  # of the pseudo-labels, as in benchmarks/paper.py
NUM_BASE, LABELS_OF_BASE = 48, 3  # COCO-OVD's base categories; COCO has 2.9 categories an image
SIZES = {
    "images": (384, "of the picture book"),
    "runs": (5, "turns that count"),
    "batch": (64, "images of a step, and of a head's call"),
    "slots": (50, "vectors of an image"),
    "side": (14, "random features: cells in a row"),
    "channels": (512, "random features: C"),
    "dim": (256, "random features: size of the joint space"),
    "names": (1000, "random features: names of the pseudo-labels"),
}


# The picture book


def prepare(folder: Path, options: argparse.Namespace) -> FinetuneJob:
    """Draw images and label them, unless they are there; a job that trains on their features."""
    dataset, labels = f"picturebook:{folder / 'train'}", str(folder / "labels")
    write_picturebook(folder / "train", images=options.images, split="train")
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in training_names()), encoding="utf-8")
    wanted = {"vocabulary": str(folder / "names.txt"), "threshold": THRESHOLD, "encoder": options.encoder}
    run_label(LabelSettings(dataset=dataset, output=labels, **wanted), progress=Progress(is_quiet=True))
    shape = {
        "slots": options.slots,
        "batch_size": options.batch,
        "held_out": 0.0,
        "objective": "set",  # the paper's, which matches
    }
    return make_job(FinetuneSettings(dataset=dataset, labels=labels, output=str(folder / "out"), **shape))


def from_images(job: FinetuneJob) -> FinetuneJob:
    """The same training, but the backbone runs in each epoch; pseudo-labels still come from the table."""
    images = job.train
    if images.row_ids is None:
        raise ValueError("the job has no table of pseudo-labels")
    table = require_table(str(images.table_uri), version=images.table_version)
    rows = take_rows(table, images.row_ids, ["uri", "etag"])
    places = {f"{name}s": rows[name].combine_chunks() for name in ("uri", "etag")}
    return dataclasses.replace(job, train=dataclasses.replace(images, **places))


def compare_epochs(cached: TrainingRun, job: FinetuneJob, runs: int) -> Figures:
    """Seconds of an epoch from features and from images."""
    run = TrainingRun(from_images(job), device=str(cached.device))
    seconds = take_turns({"features": cached.run_epoch, "images": run.run_epoch}, runs)
    medians = {name: round(statistics.median(each), 3) for name, each in seconds.items()}
    return {**medians, "num_images": len(job.train), "ratio": ratio(seconds["images"], seconds["features"])}


def cached_features(run: TrainingRun, num_images: int) -> Features:
    """Those of the first images."""
    images, made = run.job.train, run.job.train.run
    tokens = BatchReader(images, run.bundle.config, with_pseudo=False).read(np.arange(num_images)).tokens
    if tokens is None or made is None:
        raise ValueError("the job has no features")
    tokens = tokens.to(run.device).float()
    return as_features(tokens, num_prefix=made.num_prefix, height=made.height, width=made.width)


# Random features


def random_step(features: Features, slots: SlotModel, options: argparse.Namespace) -> Callable[[int], object]:
    """A function that trains one step; its argument is the number of pseudo-labels of an image."""
    device, num_images = features.cells.device, len(features.cells)
    sizes: dict[LossName, int] = {"sup": NUM_BASE, "pse": options.names}
    texts = {name: normalize(torch.randn(size, options.dim), dim=1) for name, size in sizes.items()}
    objective = Objective(slots, texts, LossSettings(), logit_scale=100.0).to(device)
    finetuner, known = Finetuner(objective, LossSettings(), AdamSettings()), torch.ones(num_images).bool()

    def step(num_labels: int) -> object:
        labels: dict[LossName, LossLabels] = {}
        counts: dict[LossName, int] = {"sup": LABELS_OF_BASE, "pse": num_labels}
        for name, count in counts.items():
            drawn = torch.rand(num_images, sizes[name]).argsort(dim=1)[:, :count]
            labels[name] = LossLabels(drawn, known).to(device)
        return finetuner.step(features, labels, epoch=0, step=0)

    return step


# The share of matching, and the heads


def share_of_matching(train: Callable[[], object], runs: int) -> Figures:
    """Seconds of the training steps and of what they match for both losses, medians; and the share."""
    steps, matchings = [], []
    for _ in range(runs + 1):
        step, matching = Stopwatch(), Stopwatch()
        timed_match, timed_step = matching.on(match), step.on(Finetuner.step)
        with patch.object(set_loss, "match", timed_match), patch.object(Finetuner, "step", timed_step):
            train()
        steps.append(step.seconds)
        matchings.append(matching.seconds)
    share = ratio(matchings[1:], steps[1:])
    return {"step": statistics.median(steps[1:]), "match": statistics.median(matchings[1:]), "share": share}


def measure(folder: Path, options: argparse.Namespace) -> Figures:
    """All figures."""
    job, runs = prepare(folder, options), options.runs
    sizes = {"num_slots": options.slots, "runs": runs}
    cached = TrainingRun(job, device=options.device)
    epochs = compare_epochs(cached, job, runs)
    found = cached.history[-1]
    mean = round((found.num_matched["pse"] + found.num_dropped["pse"]) / len(job.train), 1)
    shares: list[Figures] = [
        {"features": "picture book", "labels": mean} | share_of_matching(cached.run_epoch, runs)
    ]
    num_images = min(options.batch, len(job.train))
    compared = compare_heads(cached.slots, cached_features(cached, num_images), **sizes)
    cells = random_cells(options.batch, options.side**2, options.channels).to(options.device)
    features = Features(cells, cells.mean(dim=1, keepdim=True), options.side, options.side)
    slots = random_slots(options.side, options.channels, options.dim, options.slots).to(options.device)
    step = random_step(features, slots, options)
    for count in options.labels:
        share = share_of_matching(functools.partial(step, count), runs)
        shares.append({"features": "random", "labels": count} | share)
    compared += compare_heads(slots, features, **sizes)
    paper = at_papers_size(shares[-1]["match"], runs)
    return {"epochs": epochs, "matching": shares, "heads": compared, "papers_size": paper}


def print_table(*columns: str, rows: Iterable[Iterable[object]]) -> None:
    """As Markdown."""
    for row in (columns, ["---"] * len(columns), *rows):
        print("|", " | ".join(map(str, row)), "|")
    print()


def print_tables(found: Figures) -> None:
    """One for each question."""
    epochs = found["epochs"]
    print(f"{found['threads']} threads, load average {found['load']}, batch {found['options']['batch']}\n")
    row = [epochs["num_images"], *(f"{epochs[name]:.2f}" for name in ("features", "images", "ratio"))]
    print_table("images", "epoch from features, s", "from images, s", "ratio", rows=[row])
    rows = [
        [
            each["features"],
            each["labels"],
            f"{each['step']:.2f}",
            f"{each['match']:.4f}",
            f"{each['share']:.2%}",
        ]
        for each in found["matching"]
    ]
    print_table("features", "pseudo-labels an image", "steps, s", "matching, s", "share", rows=rows)
    heads_title = ("cells → dim", "head", "ms an image", "GFLOP", "floor, ms", "times SUM-CLIP's")
    print_table(*heads_title, rows=[each.values() for each in found["heads"]])
    print_table("RN50x64, 448 pixels, 50 slots", "", rows=found["papers_size"].items())


def main() -> int:
    """Draw, label, measure, print."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    for name, (default, told) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{told} (default {default})")
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 50], help="pseudo-labels of an image")
    parser.add_argument("--encoder", default="picturebook", help="a bundle, for the picture book")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where it is computed")
    parser.add_argument("--folder", type=Path, help="keep images, labels and features there")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the tables")
    options = parser.parse_args()
    loads = [round(os.getloadavg()[0], 1)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(options.folder or Path(folder), options)
    except ForRayError as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    loads.append(round(os.getloadavg()[0], 1))
    given = {name: str(value) for name, value in vars(options).items()}
    found |= {"threads": torch.get_num_threads(), "load": loads, "options": given}
    print(json.dumps(found)) if options.json else print_tables(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
