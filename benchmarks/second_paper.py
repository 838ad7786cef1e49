"""The second paper in miniature: one vector an image for pictures and words, tuned on the picture book.

    python benchmarks/second_paper.py --out runs/second [--things 160] [--pages 1500] [--seeds 2] [--for URI]

Draws things in many views to tune on and others, of other names, to measure on; pages with captions, to take
pseudo-captions from and to align texts by, and others to search by their captions. Compares captions
(`jobs/pseudo_caption.py`), tunes each row of the table (`jobs/finetune.py`'s recipes, without Ray) and
measures it on the four kinds of tasks (`jobs/evaluate.py`). `--for` names bundles of FOR that are measured
beside. What is done is kept in `<out>/results.jsonl`: interrupted, the same run goes on. Ends with
`<out>/second.md` and `<out>/second.png`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from for_ray.config import EvaluateSettings, FinetuneSettings, PseudoCaptionSettings
from for_ray.datasets.instances import write_instances
from for_ray.datasets.picturebook import write_picturebook
from for_ray.errors import ForRayError
from for_ray.model.bundle import open_bundle
from for_ray.model.encoder import load_encoder
from for_ray.pipeline.evaluate import run_evaluate
from for_ray.pipeline.evaluate_tasks import run_task
from for_ray.pipeline.pseudo_caption import run_pseudo_caption
from for_ray.pipeline.tower_tuning import make_tower_job
from for_ray.stages.cluster import Cluster
from for_ray.stages.progress import Progress
from for_ray.stages.tower_run import tune_here

QUIET = Progress(is_quiet=True)
VIEWS = 8
VAL_THINGS, VAL_PAGES = 100, 400
COUNTED = 100  # pages, for the number of vectors that an image has

THRESHOLD = 0.62
"""Of pseudo-captions. The tiny tower's cosines lie higher than CLIP's, where it is 0.27: captions that were
written for an image have 0.52 to 0.72."""

TUNED = {"lr": 1e-4, "epochs": 4, "batch_size": 64}
"""The tiny tower takes larger steps than ViT-L, whose learning rate is 1e-6."""

CAPTIONED = TUNED | {"caption_threshold": THRESHOLD}
ALIGNED = {"lr": 2e-4, "epochs": 8, "batch_size": 128}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: What it is called.
        recipe: What tunes it.
        begins: The row that it begins with; None: the encoder as it is.
        settings: Besides those of all.
        is_ablation: It is trained once, with the first seed.
    """

    name: str
    recipe: str
    begins: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    is_ablation: bool = False


def _weights(classes: float, captions: float) -> dict[str, float]:
    return {"gamma_classes": classes, "gamma_captions": captions}


ROWS = (
    Row("GPR-FT", "gpr", None, TUNED),
    Row("GPR-FT + Re-A", "realign", "GPR-FT", ALIGNED),
    Row("MCIP", "mcip", None, CAPTIONED),
    Row("MCIP + Re-A", "realign", "MCIP", ALIGNED),
    Row("Re-A alone", "realign", None, ALIGNED),
    Row("MCIP, λ₂ a third of λ₁", "mcip", None, CAPTIONED | _weights(0.75, 0.25), True),
    Row("MCIP, λ₂ thrice λ₁", "mcip", None, CAPTIONED | _weights(0.25, 0.75), True),
    Row("GPR-FT, projection tuned", "gpr", None, TUNED | {"tune_projection": True}, True),
    Row("MCIP, projection locked", "mcip", None, CAPTIONED | {"tune_projection": False}, True),
)
"""Re-A alone says what is a repair and what is a text tower tuned on the pages' captions; the last four what
classes and captions do against each other, and whether it is they or the projection."""

MEASURES = (
    ("image-to-image", "mAP", "image-to-image mAP"),
    ("knn", "accuracy", "k-NN accuracy"),
    ("zero-shot", "accuracy", "zero-shot accuracy"),
    ("text-to-image", "R@5", "text-to-image R@5"),
)
"""Tasks, what is taken of them, and the columns; the mean is of these."""

OBJECTS = "retrieval"
"""The first paper's task, beside them: pages by the names of what is on them, mAP@50 of all categories."""


class Bench:
    """One run of the benchmark: data, trainings, measures."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._out = options, Path(options.out)
        self._results_path = self._out / "results.jsonl"
        self._stored: dict[str, float] = {}

    def run(self) -> list[dict[str, Any]]:
        """All results, those that were there before first."""
        self._draw()  # before Ray starts: it forks
        with contextlib.ExitStack() as stack:
            _ = Cluster(stack).resources  # one for all jobs
            self._measure_all()
        return self._read()

    def _measure_all(self) -> None:
        done = self._read()
        run_pseudo_caption(self._caption_settings(), progress=Progress())
        self._measure("as pre-trained", 0, f"{self._options.encoder}#clip", done)
        for place in self._options.bundles:
            self._measure(self._name(place), 0, place, done)
        for seed in range(self._options.seeds):
            self._measure_rows([row for row in ROWS if not row.is_ablation], seed, done)
        self._measure_rows([row for row in ROWS if row.is_ablation], 0, done)

    def _name(self, place: str) -> str:
        """Of a bundle of FOR; its place, too, where another one has as many slots."""
        counts = [open_bundle(each).num_slots for each in self._options.bundles]
        slots = open_bundle(place).num_slots
        return f"FOR, {slots} slots" + (f", {place}" if counts.count(slots) > 1 else "")

    def _measure_rows(self, rows: Sequence[Row], seed: int, done: Sequence[dict[str, Any]]) -> None:
        bundles: dict[str | None, str] = {None: self._options.encoder}
        for row in rows:
            bundles[row.name] = self._tune(row, seed, bundles[row.begins])
            self._measure(row.name, seed, bundles[row.name], done)

    def _draw(self) -> None:
        options = self._options
        for split, things, pages in (
            ("train", options.things, options.pages),
            ("val", options.val_things, options.val_pages),
        ):
            write_instances(self._out / f"things-{split}", instances=things, views=VIEWS, split=split)  # type: ignore[arg-type]
            write_picturebook(self._out / f"pages-{split}", images=pages, split=split)  # type: ignore[arg-type]

    def _caption_settings(self) -> PseudoCaptionSettings:
        return PseudoCaptionSettings(
            dataset=f"labels:{self._out}/things-train/labels.csv",
            captions=f"{self._out}/pages-train/captions.jsonl",
            encoder=self._options.encoder,
            threshold=THRESHOLD,
            output=f"{self._out}/captions",
        )

    def _tune(self, row: Row, seed: int, begins: str) -> str:
        """The bundle of a row."""
        bundle_uri = f"{self._out}/{re.sub(r'[^A-Za-z0-9]+', '-', row.name)}-{seed}/bundle"
        if Path(bundle_uri, "encoder.toml").exists():
            return bundle_uri
        data = {"dataset": f"labels:{self._out}/things-train/labels.csv"}
        if row.recipe == "realign":
            data = {"dataset": f"picturebook:{self._out}/pages-train"}
        elif row.recipe == "mcip":
            data["captions"] = f"{self._out}/captions"
        output = str(Path(bundle_uri).parent)
        given = {"recipe": row.recipe, "encoder": begins, "output": output, "seed": seed, "device": "cpu"}
        started = time.monotonic()
        run = tune_here(make_tower_job(FinetuneSettings(**(given | data | row.settings))))
        losses = ", ".join(f"{name} {value:.3f}" for name, value in run.history[-1].losses.items())
        print(f"{row.name}, seed {seed}: {losses}; {time.monotonic() - started:.0f} s", file=sys.stderr)
        run.save_bundle(bundle_uri, name=f"{row.name} {seed}")
        return bundle_uri

    def _measure(self, name: str, seed: int, encoder: str, done: Sequence[dict[str, Any]]) -> None:
        for task, measure in (*((task, measure) for task, measure, _ in MEASURES), (OBJECTS, "map50")):
            key = {"name": name, "seed": seed, "task": task}
            if any(key.items() <= each.items() for each in done):
                continue
            value = self._value(encoder, task, measure)
            with self._results_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(key | {"value": value, "vectors": self._num_stored(encoder)}) + "\n")

    def _value(self, encoder: str, task: str, measure: str) -> float:
        things, pages = f"labels:{self._out}/things-val/labels.csv", f"picturebook:{self._out}/pages-val"
        if task == OBJECTS:
            settings = EvaluateSettings(dataset=pages, encoder=encoder)
            return float(run_evaluate(settings, progress=QUIET).to_json()[measure]["all"])
        # Seven of eight views of a thing can be neighbours: 21 would outvote them.
        more = {"neighbours": VIEWS - 1} if task == "knn" else {}
        dataset = pages if task == "text-to-image" else things
        settings = EvaluateSettings(dataset=dataset, task=task, encoder=encoder, **more)
        return float(run_task(settings, progress=QUIET).to_json()[measure])

    def _num_stored(self, encoder: str) -> float:
        """Vectors an image that an index stores: the mean over `COUNTED` pages."""
        if encoder not in self._stored:
            uri, _, head = encoder.partition("#")
            loaded = load_encoder(open_bundle(uri, head=head or None), "cpu")
            pages = sorted(Path(self._out, "pages-val", "images").iterdir())[:COUNTED]
            self._stored[encoder] = float(
                np.mean([len(loaded.embed_image(each.read_bytes())) for each in pages])
            )
        return self._stored[encoder]

    def _read(self) -> list[dict[str, Any]]:
        if not self._results_path.exists():
            return []
        return [json.loads(line) for line in self._results_path.read_text(encoding="utf-8").splitlines()]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Mean over the seeds, ± half their range."""
    lines = ["| | vectors | " + " | ".join(title for _, _, title in MEASURES)]
    lines[0] += " | mean of these | objects mAP@50 |"
    lines.append("| --- " * (len(MEASURES) + 4) + "|")
    for name, found in _by_name(results).items():
        cells = [_cell(found[task]) for task, _, _ in MEASURES]
        vectors = next(each["vectors"] for each in results if each["name"] == name)
        mean = float(np.mean([np.mean(found[task]) for task, _, _ in MEASURES]))
        lines.append(
            f"| {name} | {vectors:.3g} | {' | '.join(cells)} | {100 * mean:.1f} | {_cell(found[OBJECTS])} |"
        )
    return "\n".join(lines) + "\n"


def _by_name(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for each in results:
        found.setdefault(each["name"], {}).setdefault(each["task"], []).append(each["value"])
    return found


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {50 * (max(values) - min(values)):.1f}" if len(values) > 1 else ""
    return f"{100 * float(np.mean(values)):.1f}{spread}"


def draw_figure(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Pictures by pictures against pictures by words, one point a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, found) in enumerate(_by_name(results).items()):
        x, y = (100 * float(np.mean(found[task])) for task in ("image-to-image", "text-to-image"))
        marker = "os"[number // 10]  # there are ten colours
        axes.plot(x, y, marker, color=f"C{number % 10}", markersize=9, label=name, clip_on=False)
    axes.set(xlabel="image-to-image, mAP", ylabel="text-to-image, R@5")
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> int:
    """Draw, compare, tune, measure, tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="a folder for data, encoders and results")
    parser.add_argument("--things", type=int, default=160, help=f"to tune on, in {VIEWS} views (default 160)")
    parser.add_argument("--pages", type=int, default=1500, help="with captions (default 1500)")
    parser.add_argument("--val-things", type=int, default=VAL_THINGS, help="to measure on (default 100)")
    parser.add_argument("--val-pages", type=int, default=VAL_PAGES, help="to measure on (default 400)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each row (default 2)")
    parser.add_argument("--encoder", default="picturebook", help="a bundle, or open_clip:MODEL@PRETRAINED")
    parser.add_argument("--for", dest="bundles", nargs="*", default=[], help="bundles to measure beside")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        open_bundle(options.encoder, head="clip")
        results = Bench(options).run()
    except ForRayError as error:
        print(f"second_paper: {error}", file=sys.stderr)
        return 2
    text = table(results)
    Path(options.out, "second.md").write_text(text, encoding="utf-8")
    draw_figure(results, Path(options.out, "second.png"))
    print(text)
    print(f"{(time.monotonic() - started) / 60:.0f} minutes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
