"""Images with one class each: folders named after classes, and tables of uris and labels.

    DIR/CLASS/…/image.jpg        the first folder below DIR is the class, however deep the image lies
    FILE.csv|.tsv|.parquet       columns `uri` and `label`; relative uris lie beside the file

A class is a name: labels that are numbers become their digits, and gaps between them mean nothing. Classes
are in alphabetical order, images in that of their uris.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from for_ray.datasets.labelled import LabelledImages, Ragged
from for_ray.datasets.split import Split, arrange, spaced
from for_ray.datasets.tables import beside, read_columns
from for_ray.errors import DataError
from for_ray.storage import canonical_uri, list_objects, shown

IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif",
)  # fmt: skip
"""Files of a folder with other endings are no images, whatever is in them."""


def read_class_folders(folder: str, split: Split | None, *, name: str) -> LabelledImages:
    """Images in folders that are called like their classes; underscores in names become spaces.

    Files that lie directly in `folder` have no class and are left out. Two folders whose names become one are
    refused.

    Args:
        folder: A path or `s3://bucket/prefix`.
        split: Which classes are base and which novel; all are base without one.
        name: What messages call the set.

    Raises:
        ConfigError: The split does not fit.
        DataError: There is no image in a folder of a class, or two folders are called like one class.
        StorageError: The store refused.
    """
    root = canonical_uri(folder)
    uris, labels = [], []
    folders: dict[str, str] = {}
    for page in list_objects(root):
        for entry in page:
            parts = entry.uri.removeprefix(f"{root}/").split("/")
            if len(parts) > 1 and entry.uri.lower().endswith(IMAGE_ENDINGS):
                uris.append(entry.uri)
                labels.append(spaced(parts[0]))
                if (other := folders.setdefault(labels[-1], parts[0])) != parts[0]:
                    one, two = sorted((other, parts[0]))
                    raise DataError(
                        f"{shown(root)}: the folders {one!r} and {two!r} are both called like the class "
                        f"{labels[-1]!r}: rename or join them"
                    )
    if not uris:
        raise DataError(f"{shown(root)} has no images in folders of classes: expected DIR/CLASS/IMAGE.jpg")
    return _labelled(uris, labels, split, name=name, images_uri=root)


def read_class_table(uri: str, split: Split | None, *, name: str) -> LabelledImages:
    """Images that a CSV, TSV or Parquet file lists with their labels.

    An image that stands there with several labels has them all; the recipes and tasks that need one class an
    image refuse it.

    Args:
        uri: The file; columns `uri` and `label`.
        split: Which classes are base and which novel; all are base without one.
        name: What messages call the set.

    Raises:
        ConfigError: The split does not fit.
        DataError: It cannot be read, or a row lacks its uri or label.
        StorageError: The store refused.
    """
    table = canonical_uri(uri)
    uris, labels = read_columns(table, ("uri", "label"))
    for row, (image, label) in enumerate(zip(uris, labels, strict=True), start=1):
        if not image or not label:
            lacking = "label" if image else "uri"
            raise DataError(f"{shown(table)} row {row:,} has no {lacking}: fill it in, or leave the row out")
    found = [canonical_uri(beside(table, image)) for image in uris]
    return _labelled(found, labels, split, name=name, images_uri=table.rpartition("/")[0])


def classes_of(images: LabelledImages, *, why: str) -> NDArray[np.int64]:
    """The class of each image [B], -1 for one without.

    Args:
        images: Whose labels are its class.
        why: What needs one class an image, for the message.

    Raises:
        DataError: An image has several, or there are fewer than two classes.
    """
    counts = np.diff(images.labels.offsets)
    if num_several := int((counts > 1).sum()):
        first = images.uris[int(np.argmax(counts > 1))].as_py()
        raise DataError(
            f"{why} needs one class an image: {num_several:,} of the {len(images):,} images of {images.name} "
            f"have several, such as {shown(first)}; take class folders or a table of uri and label"
        )
    num_classes = len(np.unique(images.labels.values))
    if num_classes < 2:
        raise DataError(f"{why} needs two classes at least: {images.name} has {num_classes}; add others")
    classes = np.full(len(images), -1, np.int64)
    classes[counts == 1] = images.labels.values
    return classes


@dataclass(frozen=True)
class ClassImages:
    """Images with one class each.

    Attributes:
        name: What messages call the set.
        uris: Of the images [B].
        classes: Which of `names` each is of [B].
        names: Of the classes.
        num_bare: Images of the data set that have no class, and were left out.
    """

    name: str
    uris: pa.ChunkedArray
    classes: NDArray[np.int64]
    names: tuple[str, ...]
    num_bare: int

    @classmethod
    def of(cls, images: LabelledImages, *, why: str) -> ClassImages:
        """Those of a data set."""
        classes = classes_of(images, why=why)
        has_class = classes >= 0
        uris = images.uris.filter(pa.array(has_class))
        return cls(images.name, uris, classes[has_class], images.categories, int((~has_class).sum()))

    @property
    def has_pair(self) -> bool:
        """Whether two of them are of one class."""
        return int(np.bincount(self.classes).max(initial=0)) > 1


def no_pair(name: str, *, are_read: bool = False) -> str:
    """What messages say of a set where no image has another of its class.

    Args:
        name: Of the set.
        are_read: Images that cannot be read were left out.
    """
    which = "that can be read " if are_read else ""
    return f"no class of {name} has two images {which}to find each other"


def _labelled(
    uris: Sequence[str], labels: Sequence[str], split: Split | None, *, name: str, images_uri: str
) -> LabelledImages:
    """The set, in the order of the uris; images whose class the split leaves out have no label."""
    images, rows = np.unique(np.array(uris, object), return_inverse=True)
    names, values = np.unique(np.array(labels, object), return_inverse=True)
    split = split or Split(tuple(names), (), name)
    categories, is_novel, place = arrange(list(names), split, name)
    is_used = place[values] >= 0
    return LabelledImages(
        name=name,
        uris=pa.chunked_array([pa.array(images, pa.string())]),
        categories=categories,
        is_novel=is_novel,
        labels=Ragged.of_pairs(rows[is_used], place[values][is_used], len(images)),
        images_uri=images_uri,
    )
