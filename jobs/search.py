"""Find images in an index: `python jobs/search.py --index URI "a red car"`."""

from __future__ import annotations

import json
import sys

from rich.console import Console

from for_ray.command import run_command
from for_ray.config import SearchSettings, read_settings


def main() -> int:
    """Search, print, write the sheet; the exit code."""
    return run_command(lambda: _search(read_settings(SearchSettings, sys.argv[1:])))


def _search(settings: SearchSettings) -> None:
    from for_ray import retrieval  # slow to import: --help and wrong settings don't wait
    from for_ray.retrieval.printed import table_of

    if settings.sheet:
        retrieval.check_sheet(settings.sheet)
    example = retrieval.read_example(settings.image) if settings.image else None
    question = retrieval.Question(
        text=settings.query,
        image=example,
        region=settings.box,
        like=settings.like,
        k=settings.top,
        filters=retrieval.Filters(settings.under, settings.glob, settings.filter),
        min_score=settings.min_score,
        fold_at=settings.fold_at if settings.fold else None,
        unwanted_above=settings.unwanted_above,
        page=settings.page,
    )
    retrieval.check_question(question)
    snapshot_id = settings.snapshot
    if snapshot_id is None and settings.page is not None:
        snapshot_id = retrieval.snapshot_of_page(settings.page)
    index = retrieval.open_index(settings.index, snapshot_id=snapshot_id, encoder=settings.encoder)
    answer = index.ask(question)
    if settings.json_:
        print(json.dumps([hit.to_json() for hit in answer.hits]))
    else:
        # In a pipe a hit is one line: nothing is folded at the 80 columns that rich takes for granted there.
        Console(highlight=False, width=None if sys.stdout.isatty() else 1 << 20).print(table_of(answer))
    if answer.reason or answer.next_page:
        print(answer.reason or f"more: --page {answer.next_page}", file=sys.stderr)
    if settings.sheet:
        title = settings.query or f"like {str(settings.image or settings.like).rsplit('/', 1)[-1]}"
        index.write_sheet(settings.sheet, answer.hits, title=title, names=answer.names, example=example)
        print(f"sheet: {settings.sheet}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
