"""Hits as files: CSV for spreadsheets, JSON lines for programs, COCO for those who train detectors."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
from typing import Any, NamedTuple

from for_ray.retrieval import Answer, Found, Hit, StoredObjects

COLUMNS = (
    "rank", "image_id", "uri", "image_score", "name", "score", "slot",
    "x0", "y0", "x1", "y1", "width", "height", "snapshot_id",
)  # fmt: skip
"""Of the CSV file: one row for each thing that was found in an image, boxes as fractions."""

NAMELESS = "object"
"""The category of what a picture found."""

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""Signs that begin a formula, in Latin width and in Chinese, and spaces that are passed over before them."""


class File(NamedTuple):
    """An exported file: its name's end, its type and its bytes."""

    suffix: str
    media_type: str
    content: bytes


def export(answer: Answer, form: str) -> File:
    """The hits of an answer as `csv`, `jsonl` or `coco`."""
    if form == "csv":
        return File("csv", "text/csv; charset=utf-8", _csv(answer).encode("utf-8", "replace"))
    if form == "jsonl":
        return File("jsonl", "application/jsonl", _json_lines(answer).encode())
    return File("json", "application/json", json.dumps(_coco(answer)).encode())


def hit_json(hit: Hit) -> dict[str, Any]:
    """A hit as the service gives it: boxes are fractions of `width` and `height`."""
    return {**hit.to_json(), "width": hit.width, "height": hit.height}


def objects_json(held: StoredObjects, snapshot_id: int) -> dict[str, Any]:
    """What the index holds of an image, as the service gives it."""
    image = held.image
    return {
        "image_id": image.image_id,
        "uri": image.uri,
        "etag": image.etag,
        "width": image.width,
        "height": image.height,
        "snapshot_id": snapshot_id,
        "slots": [
            {"slot": slot, "box": [round(side, 4) for side in box]} for slot, box in enumerate(held.boxes)
        ],
        "columns": {name: _plain(value) for name, value in held.columns.items()},
    }


def _plain(value: Any) -> Any:
    """A value of the table as JSON knows it: what it has no word for is told as text."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value.isoformat() if isinstance(value, datetime.date) else str(value)


def _csv(answer: Answer) -> str:
    written = io.StringIO()
    writer = csv.writer(written)
    writer.writerow(COLUMNS)
    for rank, hit in enumerate(answer.hits, 1):
        for found in hit.found:
            about = (rank, hit.image_id, _harmless(hit.uri), hit.score, _harmless(found.name), found.score)
            box = (round(side, 4) for side in found.box)
            writer.writerow([*about, found.slot, *box, hit.width, hit.height, answer.snapshot_id])
    return written.getvalue()


def _harmless(text: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def _json_lines(answer: Answer) -> str:
    lines = ({**hit_json(hit), "snapshot_id": answer.snapshot_id} for hit in answer.hits)
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def _coco(answer: Answer) -> dict[str, Any]:
    """Boxes in pixels as proposals; images whose size the index does not know are left out, and counted."""
    names = list(answer.names) or [NAMELESS]
    sized = [hit for hit in answer.hits if hit.width and hit.height]
    images = [
        {"id": hit.image_id, "file_name": hit.uri, "width": hit.width, "height": hit.height} for hit in sized
    ]
    boxes = [(hit, found) for hit in sized for found in hit.found]
    about = {
        "description": f"hits of snapshot {answer.snapshot_id}",
        "snapshot_id": answer.snapshot_id,
        "images_without_size": len(answer.hits) - len(sized),
    }
    return {
        "info": about,
        "images": images,
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
        "annotations": [
            _annotation(number, hit, found, names) for number, (hit, found) in enumerate(boxes, 1)
        ],
    }


def _annotation(number: int, hit: Hit, found: Found, names: list[str]) -> dict[str, Any]:
    x0, y0, x1, y1 = found.box
    wide, high = hit.width or 0, hit.height or 0
    x, y, width, height = (round(s, 2) for s in (x0 * wide, y0 * high, (x1 - x0) * wide, (y1 - y0) * high))
    return {
        "id": number,
        "image_id": hit.image_id,
        "category_id": names.index(found.name or NAMELESS) + 1,
        "bbox": [x, y, width, height],
        "area": round(width * height, 2),
        "iscrowd": 0,
        "score": found.score,
    }
