"""What an evaluation found: as JSON, as a CSV of the categories, and as tables for a person."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from for_ray.datasets.labelled import CategoryShare
from for_ray.evaluation.summary import GroupMeans, MultilabelScores
from for_ray.stages.task_results import TaskEvaluation

MOST_ROWS = 100
"""Categories that a person is shown; more are in the CSV."""


@dataclass(frozen=True)
class Method:
    """One way to find the images, and how well it does.

    Attributes:
        name: What tables call it.
        about: What it is, for the JSON.
        map50: mAP@50.
        ap50: AP@50 of each category [V]; NaN for one without an image.
        multilabel: Where that was asked for.
    """

    name: str
    about: dict[str, Any]
    map50: GroupMeans
    ap50: NDArray[np.float64]
    multilabel: MultilabelScores | None = None

    def to_json(self) -> dict[str, Any]:
        """The measures first."""
        found: dict[str, Any] = {"map50": self.map50.model_dump()}
        if self.multilabel:
            found["multilabel"] = self.multilabel.model_dump()
        return found | self.about


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        dataset: Its name.
        num_images: Images that were measured.
        num_left_out: Images of the data set that could not be: missing, unreadable, or not in the index.
        shares: How common each category is among the measured images [V].
        methods: One an encoder; of an index two: itself, and exact search over what it stores.
        index: What is known of the index besides; None without one.
    """

    dataset: str
    num_images: int
    num_left_out: int
    shares: list[CategoryShare]
    methods: list[Method]
    index: dict[str, Any] | None = field(default=None)

    @property
    def num_empty(self) -> int:
        """Categories without an image: they are in no mean."""
        return sum(share.num_images == 0 for share in self.shares)

    def to_json(self) -> dict[str, Any]:
        """One encoder: its measures at the top; several: a list `encoders`; an index: `exact` beside it."""
        about = {
            "dataset": self.dataset,
            "images": self.num_images,
            "images_left_out": self.num_left_out,
            "categories": len(self.shares),
            "categories_without_images": self.num_empty,
        }
        first = self.methods[0].to_json()
        if self.index is not None:
            return first | self.index | {"exact": self.methods[1].to_json()} | about
        if len(self.methods) == 1:
            return first | about
        return {"encoders": [method.to_json() for method in self.methods]} | about

    def to_csv(self) -> str:
        """A line a category: its name, group, images, and AP@50 by method; empty where there is no image."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = ["ap50"] if len(self.methods) == 1 else [f"ap50 {method.name}" for method in self.methods]
        writer.writerow(["category", "group", "images", *names])
        for row, share in enumerate(self.shares):
            values = [method.ap50[row] for method in self.methods]
            measured = ["" if math.isnan(value) else f"{value:.6f}" for value in values]
            writer.writerow([share.name, share.group, share.num_images, *measured])
        return text.getvalue()


def print_evaluation(evaluation: Evaluation | TaskEvaluation, stream: TextIO) -> None:
    """Print the methods as a table, and the categories as another where they are few."""
    from rich.console import Console

    if isinstance(evaluation, TaskEvaluation):
        evaluation.print(stream)
        return
    is_terminal = stream.isatty()
    console = Console(file=stream, highlight=False, width=None if is_terminal else 200)
    if len(evaluation.shares) <= MOST_ROWS:
        _print_categories(console, evaluation)
        console.print()
    _print_methods(console, evaluation)
    console.print()
    for line in _remarks(evaluation):
        console.print(line, soft_wrap=True, markup=False)


def _print_methods(console: Any, evaluation: Evaluation) -> None:
    from rich.table import Table
    from rich.text import Text

    has_labels = any(method.multilabel for method in evaluation.methods)
    heads = ["mAP@50 base", "novel", "all"]
    heads += ["GZSL F1@3", "mAP", "ZSL F1@3", "mAP"] if has_labels else []
    table = Table("", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(head, justify="right")
    for method in evaluation.methods:
        values = list(method.map50.model_dump().values())
        if method.multilabel:
            values += list(method.multilabel.model_dump().values())
        table.add_row(Text(method.name), *map(_percent, values))
    console.print(table)


def _print_categories(console: Any, evaluation: Evaluation) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("category", "group", box=None, header_style="bold")
    for head in ("images", "share", *(method.name for method in evaluation.methods)):
        table.add_column(Text(head), justify="right")
    for row, share in enumerate(evaluation.shares):
        found = [_percent(method.ap50[row]) for method in evaluation.methods]
        table.add_row(Text(share.name), share.group, f"{share.num_images:,}", f"{share.share:.2%}", *found)
    console.print(table)


def _remarks(evaluation: Evaluation) -> list[str]:
    num_categories = len(evaluation.shares)
    lines = [f"{evaluation.dataset}: {evaluation.num_images:,} images, {num_categories:,} categories"]
    if evaluation.num_left_out:
        why = "not there, or unreadable" if evaluation.index is None else "not in the index"
        lines.append(f"{evaluation.num_left_out:,} images of the data set were left out: {why}")
    if evaluation.num_empty:
        lines.append(f"{evaluation.num_empty:,} categories without an image are in no mean")
    for name, value in (evaluation.index or {}).items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        lines.append(f"{name.replace('_', ' ')}: {shown}")
    return lines


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.2f}"
