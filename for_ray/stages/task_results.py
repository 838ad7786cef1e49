"""What an evaluation of one embedding an image found: as JSON, as a CSV, and as a table for a person."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any, TextIO


@dataclass(frozen=True)
class TaskMethod:
    """One encoder, and how well it does.

    Attributes:
        name: What tables call it.
        about: What it is, for the JSON.
        measures: By name, 0 to 1.
    """

    name: str
    about: dict[str, Any]
    measures: dict[str, float]


@dataclass(frozen=True)
class TaskEvaluation:
    """What was found of several encoders.

    Attributes:
        task: As in the settings.
        dataset: Its name.
        num_images: Images that were measured.
        num_left_out: Images of the data set that could not be read, or have no class.
        counts: What else a reader has to know, by name.
        methods: One an encoder.
    """

    task: str
    dataset: str
    num_images: int
    num_left_out: int
    counts: dict[str, int]
    methods: list[TaskMethod]

    def to_json(self) -> dict[str, Any]:
        """One encoder: its measures at the top; several: a list `encoders`."""
        about = {
            "task": self.task,
            "dataset": self.dataset,
            "images": self.num_images,
            "images_left_out": self.num_left_out,
            **self.counts,
        }
        found = [method.measures | method.about for method in self.methods]
        return (found[0] if len(found) == 1 else {"encoders": found}) | about

    def to_csv(self) -> str:
        """A line an encoder."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["encoder", *self.methods[0].measures])
        for method in self.methods:
            writer.writerow([method.name, *(f"{value:.6f}" for value in method.measures.values())])
        return text.getvalue()

    def print(self, stream: TextIO) -> None:
        """A table of the encoders, in hundredths."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console(file=stream, highlight=False, width=None if stream.isatty() else 200)
        table = Table(self.task, box=None, header_style="bold", padding=(0, 2, 0, 0))
        for name in self.methods[0].measures:
            table.add_column(name.replace("_", " "), justify="right")
        for method in self.methods:
            table.add_row(Text(method.name), *(f"{100 * value:.2f}" for value in method.measures.values()))
        console.print(table)
        counts = [f"{count:,} {name.replace('_', ' ')}" for name, count in self.counts.items()]
        line = ", ".join([f"{self.dataset}: {self.num_images:,} images", *counts])
        if self.num_left_out:
            line += f"; {self.num_left_out:,} images left out: unreadable, or without a class"
        console.print(line, soft_wrap=True, markup=False)
