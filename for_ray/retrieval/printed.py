"""An answer as a table for a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from for_ray import storage
from for_ray.retrieval.question import Answer, Found, Hit


def table_of(answer: Answer) -> Table:
    """A line for each hit: rank, score, uri, and a box; of several names each with its score."""
    names = answer.names if len(answer.names) > 1 or _asks_for_several(answer) else ()
    columns = [Text(f"{name}: x0 y0 x1 y1", overflow="fold") for name in names]
    table = Table("rank", "score", "uri", box=None, header_style="bold")
    for column in columns or [Text("box: x0 y0 x1 y1")]:
        table.add_column(column)
    for rank, hit in enumerate(answer.hits, start=1):
        boxes = [_cell(hit, name) for name in names] or [_sides(hit.found[0])]
        uri = Text(storage.shown(hit.uri), overflow="fold")
        table.add_row(f"{rank}", f"{hit.score:.4f}", uri, *boxes)
        for folded in hit.folded:
            table.add_row("", "≈", Text(storage.shown(folded), overflow="fold"), style="dim")
    return table


def _asks_for_several(answer: Answer) -> bool:
    return any(len(hit.found) > 1 for hit in answer.hits)


def _cell(hit: Hit, name: str) -> str:
    return "; ".join(f"{found.score:.4f} {_sides(found)}" for found in hit.found if found.name == name)


def _sides(found: Found) -> str:
    return " ".join(f"{side:.2f}" for side in found.box)
