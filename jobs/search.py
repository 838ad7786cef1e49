"""Find images in an index: `python jobs/search.py --index URI "a red car"`."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from for_ray.command import run_command
from for_ray.config import SearchSettings, read_settings


def main() -> int:
    """Search, print, write the sheet; the exit code."""
    return run_command(lambda: _search(read_settings(SearchSettings, sys.argv[1:])))


def _search(settings: SearchSettings) -> None:
    from for_ray import retrieval, storage  # slow to import: --help and wrong settings don't wait

    if settings.sheet:
        retrieval.check_sheet(settings.sheet)
    example = retrieval.read_example(settings.image) if settings.image else None
    index = retrieval.open_index(settings.index, snapshot_id=settings.snapshot, encoder=settings.encoder)
    hits = index.search(settings.query, image=example, k=settings.top)
    rows = [hit.to_json() for hit in hits]
    uris = [Text(storage.shown(hit.uri), overflow="fold") for hit in hits]
    print(json.dumps(rows)) if settings.json_ else _print_table(rows, uris)
    if len(hits) < settings.top:
        print(f"{len(hits):,} images: this snapshot of the index holds no more", file=sys.stderr)
    if settings.sheet:
        title = settings.query or f"like {str(settings.image).rsplit('/', 1)[-1]}"
        index.write_sheet(settings.sheet, hits, title=title, example=example)
        print(f"sheet: {settings.sheet}", file=sys.stderr)


def _print_table(rows: list[dict[str, Any]], uris: list[Text]) -> None:
    table = Table("rank", "score", "uri", "box: x0 y0 x1 y1", box=None, header_style="bold")
    for rank, (row, uri) in enumerate(zip(rows, uris, strict=True), start=1):
        table.add_row(f"{rank}", f"{row['score']:.4f}", uri, " ".join(f"{side:.2f}" for side in row["box"]))
    # In a pipe a hit is one line: nothing is folded at the 80 columns that rich takes for granted there.
    piped = 50 + max((uri.cell_len for uri in uris), default=0)
    Console(highlight=False, width=None if sys.stdout.isatty() else piped).print(table)


if __name__ == "__main__":
    sys.exit(main())
