"""LVIS v1: COCO's images with 1,203 categories, each annotated in some of the images only (federated).

Images carry no `file_name` but a `coco_url`, whose last two parts name the file
(`train2017/000000391895.jpg`); `neg_category_ids` were looked for and are not there, of
`not_exhaustive_category_ids` not all instances are annotated. Names are asked for with spaces, not
underscores.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from for_ray.datasets.coco import CocoColumns, file_name_of
from for_ray.datasets.labelled import LabelledImages, Ragged
from for_ray.datasets.split import Split, arrange, spaced
from for_ray.datasets.streams import Integers, Record, text
from for_ray.errors import DataError
from for_ray.storage import shown

NEGATIVES, NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"

FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}


def read_lvis(annotations_uri: str, images_uri: str, split: Split | None, *, name: str) -> LabelledImages:
    """Read LVIS's annotations.

    Args:
        annotations_uri: The JSON file.
        images_uri: The folder or prefix with `train2017/` and `val2017/`.
        split: Without one, rare categories are novel, frequent and common ones base.
        name: What messages call the set.

    Raises:
        ConfigError: The split does not fit.
        DataError: The file is not LVIS's format, contradicts itself, or holds nothing.
        StorageError: The store refused.
    """
    federation = _Federation(shown(annotations_uri))
    columns = CocoColumns(
        shown(annotations_uri),
        file_name=_file_name,
        on_image=federation.add_image,
        on_category=federation.add_category,
    )
    columns.read(annotations_uri)
    columns.category_names = list(map(spaced, columns.category_names))
    split = split.spaced() if split else federation.frequency_split(columns.category_names)
    images = columns.labelled(images_uri, split, name=name)
    _, _, place = arrange(columns.category_names, split, columns.source)
    negatives, not_exhaustive = (
        _select(federation.lists[key], place[columns.category_rows(federation.lists[key].ids)], columns)
        for key in (NEGATIVES, NOT_EXHAUSTIVE)
    )
    return dataclasses.replace(images, negatives=negatives, not_exhaustive=not_exhaustive)


def _file_name(record: Record, where: str) -> str:
    if "coco_url" not in record:
        return file_name_of(record, where)
    return "/".join(text(record, "coco_url", where).split("/")[-2:])


class _Lists:
    """One list of category ids an image, in the file's order of images."""

    def __init__(self) -> None:
        self.rows, self.ids = Integers(), Integers()

    def add(self, row: int, ids: list[int]) -> None:
        for category_id in ids:
            self.rows.add(row)
            self.ids.add(category_id)


class _Federation:
    """What LVIS says besides COCO's format."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._num_images = 0
        self._frequencies: list[str] = []
        self.lists = {key: _Lists() for key in (NEGATIVES, NOT_EXHAUSTIVE)}

    def add_image(self, record: Record) -> None:
        for key, lists in self.lists.items():
            lists.add(self._num_images, self._ids(record, key))
        self._num_images += 1

    def add_category(self, record: Record) -> None:
        frequency = record.get("frequency")
        if frequency not in FREQUENCIES:
            raise DataError(
                f"{self._source} is not in LVIS's format: a category needs a 'frequency' of r, c or f, got "
                f"{str(record)[:80]}; is it COCO's? then give coco:…"
            )
        self._frequencies.append(frequency)

    def frequency_split(self, names: list[str]) -> Split:
        pairs = list(zip(names, self._frequencies, strict=True))
        base = tuple(name for name, frequency in pairs if frequency != "r")
        novel = tuple(name for name, frequency in pairs if frequency == "r")
        return Split(base, novel, "LVIS by frequency")

    def _ids(self, record: Record, key: str) -> list[int]:
        ids: Any = record.get(key)
        if not isinstance(ids, list) or not all(isinstance(each, int) for each in ids):
            raise DataError(
                f"{self._source} is not in LVIS's format: an image needs a list of ids as {key!r}, got "
                f"{str(ids)[:60]}; is it COCO's? then give coco:…"
            )
        return ids


def _select(lists: _Lists, places: NDArray[np.int64], columns: CocoColumns) -> Ragged:
    """The lists in the order of the image ids, as places among the categories that are used."""
    rank = np.empty_like(columns.image_order)
    rank[columns.image_order] = np.arange(len(rank))
    is_used = places >= 0
    return Ragged.of_pairs(rank[lists.rows.column()[is_used]], places[is_used], len(rank))
