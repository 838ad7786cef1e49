"""COCO's format: instances of 2014 and 2017, the picture book, and whatever else is written like them.

    {"images": [{"id", "file_name", …}], "annotations": [{"image_id", "category_id", …}],
     "categories": [{"id", "name", …}]}

An image shows a category when any annotation says so, a crowd too. Order of the keys: any.
"""

from __future__ import annotations

import functools
import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from for_ray.datasets.labelled import LabelledImages, Ragged
from for_ray.datasets.split import Split, arrange, listed
from for_ray.datasets.streams import Integers, Record, Strings, integer, stream_json, text
from for_ray.errors import ConfigError, DataError
from for_ray.storage import canonical_uri, shown

BASE = (
    "person", "bicycle", "car", "motorcycle", "train", "truck", "boat", "bench", "bird", "horse", "sheep",
    "bear", "zebra", "giraffe", "backpack", "handbag", "suitcase", "frisbee", "skis", "kite", "surfboard",
    "bottle", "fork", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "pizza",
    "donut", "chair", "bed", "toilet", "tv", "laptop", "mouse", "remote", "microwave", "oven", "toaster",
    "refrigerator", "book", "clock", "vase", "toothbrush",
)  # fmt: skip
"""The 48 base categories of COCO-OVD (Bansal et al., ECCV 2018)."""

NOVEL = (
    "airplane", "bus", "cat", "dog", "cow", "elephant", "umbrella", "tie", "snowboard", "skateboard", "cup",
    "knife", "cake", "couch", "keyboard", "sink", "scissors",
)  # fmt: skip
"""Its 17 novel ones."""

UNUSED = (
    "traffic light", "fire hydrant", "stop sign", "parking meter", "baseball bat", "baseball glove",
    "tennis racket", "sports ball", "wine glass", "hot dog", "potted plant", "dining table", "cell phone",
    "hair drier", "teddy bear",
)  # fmt: skip
"""The other 15 of COCO's 80, which that benchmark leaves out."""


def read_coco(annotations_uri: str, images_uri: str, split: Split | None, *, name: str) -> LabelledImages:
    """Read a data set in COCO's format.

    Args:
        annotations_uri: The JSON file.
        images_uri: The folder or prefix that `file_name` starts from.
        split: Without one, COCO-OVD's, as far as the file has those categories: it may have no others than
            COCO's 80.
        name: What messages call the set.

    Raises:
        ConfigError: The split does not fit, or is missing.
        DataError: The file is not COCO's format, contradicts itself, or holds nothing.
        StorageError: The store refused.
    """
    columns = CocoColumns(shown(annotations_uri))
    columns.read(annotations_uri)
    split = split or _ovd_split(columns)
    return columns.labelled(images_uri, split, name=name)


def _ovd_split(columns: CocoColumns) -> Split:
    names = set(columns.category_names)
    if unknown := sorted(names - {*BASE, *NOVEL, *UNUSED}):
        raise ConfigError(
            f"{columns.source} has categories that COCO has not ({listed(unknown)}): which are base, which "
            'novel? give --split FILE with {"base": [names], "novel": [names]}'
        )
    base, novel = (tuple(name for name in group if name in names) for group in (BASE, NOVEL))
    return Split(base, novel, "COCO-OVD (48/17)")


def file_name_of(record: Record, where: str) -> str:
    """COCO's `file_name`."""
    return text(record, "file_name", where)


@dataclass
class CocoColumns:
    """What a file says, column by column, in its own ids.

    Attributes:
        source: What messages call the file.
        file_name: Where an image's record says what its file is called.
        on_image, on_category: Called with each record, for what a kin of COCO's says besides.
    """

    source: str
    file_name: Callable[[Record, str], str] = file_name_of
    on_image: Callable[[Record], None] = lambda _: None
    on_category: Callable[[Record], None] = lambda _: None
    category_names: list[str] = field(default_factory=list)
    _category_ids: Integers = field(default_factory=Integers)
    _image_ids: Integers = field(default_factory=Integers)
    _file_names: Strings = field(default_factory=Strings)
    _annotated_images: Integers = field(default_factory=Integers)
    _annotated_categories: Integers = field(default_factory=Integers)

    def read(self, uri: str) -> None:
        """Fill the columns; raises `DataError` where the file is not COCO's format."""
        sinks = {
            "images.item": self._add_image,
            "annotations.item": self._add_annotation,
            "categories.item": self._add_category,
        }
        stream_json(uri, sinks)
        lists = {
            "images": self._image_ids,
            "annotations": self._annotated_images,
            "categories": self._category_ids,
        }
        for key, column in lists.items():
            if not len(column):
                raise DataError(
                    f"{self.source} is no annotation file in COCO's format: it has no {key}; expected "
                    '{"images": [...], "annotations": [...], "categories": [...]}'
                )
        self._require_distinct()

    @functools.cached_property
    def image_order(self) -> NDArray[np.int64]:
        """Rows of the file's images in the order of their ids [B]."""
        return np.argsort(self._image_ids.column(), kind="stable")

    def labelled(self, images_uri: str, split: Split, *, name: str) -> LabelledImages:
        """The data set, its images in the order of their ids.

        Raises:
            ConfigError: The split does not fit.
            DataError: Annotations of images or categories that are not there, or a file named twice.
        """
        categories, is_novel, place = arrange(self.category_names, split, self.source)
        rows = self._places("image", self._image_ids.column()[self.image_order], self._annotated_images)
        columns = place[self.category_rows(self._annotated_categories)]
        is_used = columns >= 0
        root = canonical_uri(images_uri)
        return LabelledImages(
            name=name,
            uris=uris_below(root, self._file_names.column().take(pa.array(self.image_order)), self.source),
            categories=categories,
            is_novel=is_novel,
            labels=Ragged.of_pairs(rows[is_used], columns[is_used], len(self.image_order)),
            images_uri=root,
        )

    def category_rows(self, ids: Integers) -> NDArray[np.int64]:
        """For each id its place in `category_names`; raises `DataError` where there is none."""
        held = self._category_ids.column()
        order = np.argsort(held)
        return order[self._places("category", held[order], ids)]

    def _places(self, kind: str, sorted_ids: NDArray[np.int64], wanted: Integers) -> NDArray[np.int64]:
        asked = wanted.column()
        places = np.minimum(np.searchsorted(sorted_ids, asked), len(sorted_ids) - 1)
        is_there = sorted_ids[places] == asked
        if not is_there.all():
            missing = np.unique(asked[~is_there])
            raise DataError(
                f"{self.source} is inconsistent: {int((~is_there).sum()):,} entries are of a missing {kind} "
                f"(id {missing[0]}); restore the file"
            )
        return places

    def _add_image(self, record: Record) -> None:
        where = f"an image in {self.source}"
        self._image_ids.add(integer(record, "id", where))
        self._file_names.add(self.file_name(record, where))
        self.on_image(record)

    def _add_annotation(self, record: Record) -> None:
        where = f"an annotation in {self.source}"
        self._annotated_images.add(integer(record, "image_id", where))
        self._annotated_categories.add(integer(record, "category_id", where))

    def _add_category(self, record: Record) -> None:
        where = f"a category in {self.source}"
        self._category_ids.add(integer(record, "id", where))
        self.category_names.append(text(record, "name", where))
        self.on_category(record)

    def _require_distinct(self) -> None:
        for kind, ids in (("image", self._image_ids), ("category", self._category_ids)):
            values, counts = np.unique(ids.column(), return_counts=True)
            if (counts > 1).any():
                raise DataError(f"{self.source} has several {kind} records of id {values[counts > 1][0]}")


def uris_below(root: str, file_names: pa.ChunkedArray, source: str) -> pa.ChunkedArray:
    """The uris of files that are named from a folder or prefix, checked: distinct, and inside.

    Raises:
        DataError: A name leads out of the folder, or occurs twice.
    """
    names = [
        pa.array(list(map(posixpath.normpath, chunk.to_pylist())), pa.string()) for chunk in file_names.chunks
    ]
    paths = pa.chunked_array(names, pa.string())
    is_outside = pc.match_substring_regex(paths, r"^(/|\.\.(/|$)|\.$)")
    if pc.any(is_outside).as_py():
        name = file_names.filter(is_outside)[0].as_py()
        raise DataError(f"{source} names the image {shown(name)}, which is not below {shown(root)}")
    if pc.count_distinct(paths).as_py() < len(paths):
        counts = pc.value_counts(paths.combine_chunks())
        name = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise DataError(f"{source} has several images of one file: {shown(name)}")
    return pc.binary_join_element_wise(pa.scalar(root.rstrip("/")), paths, "/")
