"""The paper's comparison in miniature: every method, loss and ablation on the picture book, features cached.

    python benchmarks/paper.py --out runs/paper [--train 4000] [--val 2000] [--seeds 2] [--only NAME …]

Draws the data, labels it (`jobs/pseudo_label.py`), measures CLIP, Dense-CLIP and Cluster-CLIP
(`jobs/evaluate.py`), then trains each row of the tables (`jobs/finetune.py`'s settings, without Ray), one
process a core, one thread each. What is done is kept in `<out>/results-<run>.jsonl`: interrupted,
the same run goes on.
Everything is measured on the val split, on which nothing is chosen. Ends with `<out>/tables.md` and
`<out>/paper.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from for_ray.config import EvaluateSettings, FinetuneSettings, LabelSettings
from for_ray.datasets.captioned import training_names
from for_ray.errors import ForRayError
from for_ray.model.bundle import open_bundle
from for_ray.stages.progress import Progress

# What fits a head of 512 channels and a few thousand steps; the rest is the job's default, or the preset's.
MINIATURE: dict[str, Any] = {
    "slots": 8,
    "feedforward": 512,
    "lr": 5e-4,
    "warmup_steps": 50,
    "epochs": 8,
    "lr_drop_epoch": 6,
    "batch_size": 32,
    "precision": "bfloat16",
    "held_out": 0.0,
}
THRESHOLD = (
    0.2  # of the pseudo-labels: 307 names and a logit scale near 40, where the paper has 21,843 and 100
)


@dataclass(frozen=True)
class Row:
    """A line of a table: what is trained, how, and with how many seeds."""

    table: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    labels: str = "labels"
    is_main: bool = False


def rows() -> list[Row]:
    """All that is trained; main rows with every seed, ablations with the first."""
    for_default: dict[str, Any] = {}
    return [
        Row("Methods", "FT-CLIP", {"head": "clip"}, is_main=True),
        Row("Methods", "FT-Dense-CLIP", {"head": "dense"}, is_main=True),
        Row("Methods", "FOR, supervised only", {"losses": "sup"}, is_main=True),
        Row("Methods", "FOR, pseudo-labels only", {"losses": "pse"}, is_main=True),
        Row("Methods", "FOR, pseudo-labels, without novel names", {"losses": "pse"}, "labels-no-novel", True),
        Row("Methods", "FOR, without novel names", for_default, "labels-no-novel", True),
        Row("Methods", "FOR", for_default, is_main=True),
        *(Row("Slots", f"{n} slots", {"slots": n}) for n in (5, 10, 25, 50)),
        *(Row("Decoder layers", f"{n} layers", {"layers": n}) for n in (0, 1, 3)),
        Row("Freezing", "q, k trained", {"freeze": "vo"}),
        Row("Freezing", "q, k, v, o trained", {"freeze": "none"}),
        *(
            Row("Labelled fraction", f"{fraction:.0%}{', supervised only' if losses == 'sup' else ''}",
                {"labelled_fraction": fraction, "losses": losses})
            for fraction in (0.01, 0.1) for losses in ("sup", "sup,pse")
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One training: its row, its seed, and where everything lies."""

    row: Row
    seed: int
    out: Path

    @property
    def key(self) -> str:
        """What the results call it."""
        return f"{self.row.table} | {self.row.name} | {self.seed}"

    def settings(self) -> FinetuneSettings:
        """Those of `jobs/finetune.py`."""
        values = MINIATURE | self.row.settings
        name = "".join(letter if letter.isalnum() else "-" for letter in self.key)
        return FinetuneSettings(
            dataset=f"picturebook:{self.out / 'train'}",
            labels=str(self.out / self.row.labels),
            val=f"picturebook:{self.out / 'val'}",
            val_labels=str(self.out / "val-features"),
            output=str(self.out / "heads" / name),
            seed=self.seed,
            device="cpu",
            **values,
        )


def train(task: Task) -> dict[str, Any]:
    """Train a row, and measure it on the val split when it is done; in a process of its own."""
    import torch

    from for_ray.evaluation.ranking import average_precisions_at_k
    from for_ray.evaluation.summary import GroupMeans
    from for_ray.pipeline.finetune import make_job
    from for_ray.stages.training_run import train_here

    torch.set_num_threads(1)
    started = time.monotonic()
    job = make_job(task.settings())
    val, is_novel = job.val, job.val_is_novel
    if val is None or is_novel is None:
        raise ValueError("the job has no validation images")
    run = train_here(dataclasses.replace(job, val=None), device="cpu")
    run.select_best()
    text = run.embed(job.val_categories)
    relevant = np.zeros((len(text), len(val)), bool)
    relevant[val.labels.values, np.repeat(np.arange(len(val)), np.diff(val.labels.offsets))] = True
    means = GroupMeans.of(average_precisions_at_k(run.score(val, text), relevant, 50), is_novel)
    return {
        "key": task.key,
        "map50": means.model_dump(),
        "losses": [metrics.losses for metrics in run.history],
        "seconds": round(time.monotonic() - started, 1),
    }


def draw(out: Path, split: str, num_images: int) -> None:
    """The picture book's split, unless it is there."""
    module = [sys.executable, "-m", "for_ray.datasets.picturebook"]
    wanted = ["--out", str(out / split), "--images", str(num_images), "--split", split]
    subprocess.run([*module, *wanted], check=True, stdout=sys.stderr)


def label(options: argparse.Namespace) -> None:
    """Pseudo-labels and features of the train split, with the novel names and without; features of val."""
    from for_ray.pipeline.label import run_label

    names = options.out / "names.txt"
    names.write_text("".join(f"{name}\n" for name in training_names()), encoding="utf-8")
    for name, split, without_novel in (
        ("labels", "train", False),
        ("labels-no-novel", "train", True),
        ("val-features", "val", False),
    ):
        settings = LabelSettings(
            dataset=f"picturebook:{options.out / split}",
            encoder=options.encoder,
            vocabulary=str(names),
            threshold=THRESHOLD,
            exclude_novel=without_novel,
            output=str(options.out / name),
        )
        print(run_label(settings, progress=Progress()).model_dump_json(), file=sys.stderr)


def measure_untrained(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """CLIP, Dense-CLIP and Cluster-CLIP, as `jobs/evaluate.py` measures them."""
    from for_ray.pipeline.evaluate import run_evaluate

    heads = {"clip": "CLIP", "dense": "Dense-CLIP", "cluster": "Cluster-CLIP"}
    settings = EvaluateSettings(
        dataset=f"picturebook:{options.out / 'val'}",
        encoder=tuple(f"{options.encoder}#{head}" for head in heads),
    )
    evaluation = run_evaluate(settings, progress=Progress())
    for name, method in zip(heads.values(), evaluation.methods, strict=True):
        yield {"key": f"Methods | {name} | 0", "map50": method.map50.model_dump()}


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row and seed that has no result yet, two at a time; all results."""
    of_run = [
        options.train,
        options.val,
        options.encoder,
        open_bundle(options.encoder).fingerprint,
        MINIATURE,
    ]
    run_id = hashlib.sha256(json.dumps(of_run).encode()).hexdigest()[:8]
    path = options.out / f"results-{run_id}.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {result["key"] for result in results}
    wanted = [row for row in rows() if not options.only or row.name in options.only]
    tasks = [
        Task(row, seed, options.out) for row in wanted for seed in range(options.seeds if row.is_main else 1)
    ]
    with path.open("a", encoding="utf-8") as file:

        def keep(result: dict[str, Any]) -> None:
            results.append(result)
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(
                result["key"], json.dumps(result["map50"]), f"{result.get('seconds', 0)} s", file=sys.stderr
            )

        if "Methods | CLIP | 0" not in done:
            for result in measure_untrained(options):
                keep(result)
        context = multiprocessing.get_context("spawn")
        with context.Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool:
            for result in pool.imap_unordered(train, [task for task in tasks if task.key not in done]):
                keep(result)
    return results


def tables(results: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a table for each comparison; mean over the seeds, and half the range."""
    names: dict[str, dict[str, list[dict[str, float]]]] = {}
    for result in results:
        table, name, _ = result["key"].split(" | ")
        names.setdefault(table, {}).setdefault(name, []).append(result["map50"])
    order = [row.name for row in rows()]
    for table, of_name in names.items():
        if table != "Methods":
            of_name["FOR"] = [each["map50"] for each in results if each["key"] == "Methods | FOR | 0"]
        yield f"\n| {table} | base | novel | all | seeds |\n| --- | --- | --- | --- | --- |"
        for name in sorted(of_name, key=lambda name: order.index(name) if name in order else -1):
            found = of_name[name]
            if found:
                cells = " | ".join(
                    _cell([each[group] for each in found]) for group in ("base", "novel", "all")
                )
                yield f"| {name} | {cells} | {len(found)} |"


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{float(np.mean(values)):.3f}{spread}"


def draw_figure(results: list[dict[str, Any]], path: Path) -> None:
    """Base against novel, one point a method."""
    from matplotlib.figure import Figure

    found: dict[str, list[dict[str, float]]] = {}
    for result in results:
        table, name, _ = result["key"].split(" | ")
        if table == "Methods":
            found.setdefault(name, []).append(result["map50"])
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, means in found.items():
        base, novel = (float(np.mean([each[group] for each in means])) for group in ("base", "novel"))
        axes.plot(base, novel, "s" if "CLIP" in name and "FT" not in name else "o", markersize=8)
        axes.annotate(name, (base, novel), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="mAP@50, base categories", ylabel="mAP@50, novel categories")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main() -> int:
    """Draw, label, train, measure, tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder for data, features and results")
    parser.add_argument("--train", type=int, default=4000, help="images to train on (default 4000)")
    parser.add_argument("--val", type=int, default=2000, help="images to measure on (default 2000)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each method (default 2)")
    parser.add_argument("--encoder", default="picturebook", help="a bundle, or open_clip:MODEL@PRETRAINED")
    parser.add_argument("--only", nargs="+", help="names of rows; the others are left out")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        draw(options.out, "train", options.train)
        draw(options.out, "val", options.val)
        label(options)
        results = run_all(options)
    except ForRayError as error:
        print(f"paper: {error}", file=sys.stderr)
        return 2
    text = "\n".join(tables(results))
    (options.out / "tables.md").write_text(text + "\n", encoding="utf-8")
    draw_figure(results, options.out / "paper.png")
    print(text)
    print(f"\n{(time.monotonic() - started) / 60:.0f} minutes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
