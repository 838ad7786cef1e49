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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from for_ray.config import EvaluateSettings, FinetuneSettings, LabelSettings
from for_ray.config.reading import read_preset
from for_ray.datasets.captioned import training_names
from for_ray.errors import ForRayError
from for_ray.model.bundle import open_bundle
from for_ray.pipeline.finetune import make_job
from for_ray.stages.progress import Progress

if TYPE_CHECKING:
    from for_ray.stages.training_images import TrainingImages

RECIPE = read_preset(FinetuneSettings, "picturebook") | {"precision": "bfloat16"}
LABELLING = read_preset(LabelSettings, "picturebook")

VAL_SEED = 1
"""Of the val images: the recipe was looked for with others (seed 0) of the same categories."""


FOR = "FOR"
"""The row that the ablations differ from."""


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
    paper = {"objective": "set"}
    return [
        Row("Methods", FOR, {}, is_main=True),
        Row("Methods", "FT-CLIP", {"head": "clip"}, is_main=True),
        Row("Methods", "FT-Dense-CLIP", {"head": "dense"}, is_main=True),
        Row("Methods", "FOR, supervised only", {"losses": "sup"}, is_main=True),
        Row("Methods", "FOR, pseudo-labels only", {"losses": "pse"}, is_main=True),
        Row("Methods", "FOR, pseudo-labels only, no novel names", {"losses": "pse"}, "labels-no-novel", True),
        Row("Methods", "FOR, no novel names", {}, "labels-no-novel"),
        Row("The paper's losses", "FOR, set losses", paper, is_main=True),
        Row("The paper's losses", "FOR, set losses, supervised only", paper | {"losses": "sup"}),
        Row("The paper's losses", "FOR, set losses, pseudo-labels only", paper | {"losses": "pse"}),
        Row("The paper's losses", "FT-CLIP, set losses", paper | {"head": "clip"}),
        Row("The paper's losses", "FT-Dense-CLIP, set losses", paper | {"head": "dense"}),
        *(Row("Slots", f"{n} slots", {"slots": n}) for n in (5, 10, 50)),
        *(Row("Decoder layers", f"{n} layers", {"layers": n}) for n in (0, 1, 3)),
        Row("Freezing", "q, k trained", {"freeze": "vo"}),
        Row("Freezing", "nothing of the pooling trained", {"freeze": "qkvo"}),
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
        values = RECIPE | self.row.settings
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
    precisions = average_precisions_at_k(run.score(val, text), relevance(val, len(text)), 50)
    means = GroupMeans.of(precisions, is_novel)
    return {
        "key": task.key,
        "map50": means.model_dump(),
        "losses": [metrics.losses for metrics in run.history],
        "seconds": round(time.monotonic() - started, 1),
    }


def draw(out: Path, split: str, num_images: int) -> None:
    """The picture book's split, unless it is there."""
    module = [sys.executable, "-m", "for_ray.datasets.picturebook"]
    seed = str(VAL_SEED if split == "val" else 0)
    wanted = ["--out", str(out / split), "--images", str(num_images), "--split", split, "--seed", seed]
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
            exclude_novel=without_novel,
            output=str(options.out / name),
            **LABELLING,
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
    yield {"key": "Methods | Windows (the soft pseudo-labels) | 0", "map50": measure_teacher(options)}


def measure_teacher(options: argparse.Namespace) -> dict[str, Any]:
    """What the ranking loss is taught by, on the val split."""
    import torch

    from for_ray.evaluation.ranking import average_precisions_at_k
    from for_ray.evaluation.summary import GroupMeans
    from for_ray.model.encoder import load_encoder
    from for_ray.model.rank_loss import WindowTeacher
    from for_ray.model.slot_model import as_features
    from for_ray.stages.training_images import BatchReader

    job = make_job(Task(Row("Methods", "teacher"), 0, options.out).settings())
    images, is_novel = job.val, job.val_is_novel
    if images is None or images.run is None or is_novel is None:
        raise ValueError("the val split has no features")
    encoder = load_encoder(open_bundle(job.bundle_uri, allow_untrained=True), "cpu")
    text, teacher = torch.from_numpy(encoder.embed_text(job.val_categories)), WindowTeacher(encoder.pooling)
    shape = {name: getattr(images.run, name) for name in ("num_prefix", "height", "width")}
    reader = BatchReader(images, encoder.bundle.config, with_pseudo=False)
    batches = reader.batches(np.array_split(np.arange(len(images)), max(1, len(images) // 200)))
    scores = torch.cat(
        [teacher(as_features(torch.as_tensor(batch.tokens).float(), **shape), text) for batch in batches]
    )
    precisions = average_precisions_at_k(scores.T.numpy(), relevance(images, len(text)), 50)
    return GroupMeans.of(precisions, is_novel).model_dump()


def relevance(images: TrainingImages, num_categories: int) -> NDArray[np.bool_]:
    """Which category each image shows [V, B]."""
    relevant = np.zeros((num_categories, len(images)), bool)
    relevant[images.labels.values, np.repeat(np.arange(len(images)), np.diff(images.labels.offsets))] = True
    return relevant


def measure_labels(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Precision and recall of the pseudo-labels, where the truth is known."""
    from for_ray.datasets.spec import open_dataset
    from for_ray.index.table import take_rows
    from for_ray.stages.training_data import find_images, open_labels
    from for_ray.stages.training_images import ragged_of

    dataset, table = (
        open_dataset(f"picturebook:{options.out / 'train'}"),
        open_labels(str(options.out / "labels")),
    )
    images = find_images(dataset, table, num_categories=len(dataset.categories)).images
    truth = relevance(images, len(dataset.categories))
    given = ragged_of(take_rows(table.table, np.asarray(images.row_ids), ["labels"])["labels"])
    names = training_names()
    said = np.zeros((len(names), len(images)), bool)
    said[given.values, np.repeat(np.arange(len(images)), np.diff(given.offsets))] = True
    place = {name: number for number, name in enumerate(names)}
    for group, is_novel in (("base", False), ("novel", True)):
        known = [
            number
            for number, name in enumerate(dataset.categories)
            if bool(dataset.is_novel[number]) is is_novel and name in place
        ]
        true, claimed = truth[known], said[[place[dataset.categories[number]] for number in known]]
        hits = int((true & claimed).sum())
        yield {
            "key": f"Pseudo-labels | {group} | 0",
            "precision": hits / max(1, int(claimed.sum())),
            "recall": hits / max(1, int(true.sum())),
        }


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row and seed that has no result yet, two at a time; all results."""
    wanted = [row for row in rows() if not options.only or row.name in options.only]
    tasks = [
        Task(row, seed, options.out) for row in wanted for seed in range(options.seeds if row.is_main else 1)
    ]
    fixed = [options.train, options.val, VAL_SEED, LABELLING, open_bundle(options.encoder).fingerprint]
    every = [Task(row, 0, Path()).settings().model_dump(mode="json") for row in rows()]
    run_id = hashlib.sha256(json.dumps([fixed, every]).encode()).hexdigest()[:8]
    path = options.out / f"results-{run_id}.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {result["key"] for result in results}
    with path.open("a", encoding="utf-8") as file:

        def keep(result: dict[str, Any]) -> None:
            results.append(result)
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(
                json.dumps({name: value for name, value in result.items() if name != "losses"}),
                file=sys.stderr,
            )

        if "Methods | Windows (the soft pseudo-labels) | 0" not in done:  # the last of these
            for result in (*measure_labels(options), *measure_untrained(options)):
                if result["key"] not in done:
                    keep(result)
        context = multiprocessing.get_context("spawn")
        with context.Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool:
            for result in pool.imap_unordered(train, [task for task in tasks if task.key not in done]):
                keep(result)
    return results


def tables(results: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a table for each comparison; mean over the seeds, and half the range."""
    names: dict[str, dict[str, list[dict[str, float]]]] = {}
    yield "| Pseudo-labels | precision | recall |\n| --- | --- | --- |"
    for result in results:
        table, name, _ = result["key"].split(" | ")
        if table == "Pseudo-labels":
            yield f"| {name} | {result['precision']:.2f} | {result['recall']:.2f} |"
        else:
            names.setdefault(table, {}).setdefault(name, []).append(result["map50"])
    order = [row.name for row in rows()]
    for table, of_name in names.items():
        if table != "Methods":
            of_name[FOR] = [each["map50"] for each in results if each["key"] == f"Methods | {FOR} | 0"]
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
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, means) in enumerate(found.items()):
        base, novel = (float(np.mean([each[group] for each in means])) for group in ("base", "novel"))
        marker = (
            "*" if name == FOR else "o" if name.startswith("FOR") else "^" if name.startswith("FT") else "s"
        )
        size = 14 if name == FOR else 8
        axes.plot(base, novel, marker, color=f"C{number % 10}", markersize=size, label=name, clip_on=False)
    axes.set(xlabel="mAP@50, base categories", ylabel="mAP@50, novel categories")
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
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
    except (ForRayError, subprocess.CalledProcessError) as error:
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
