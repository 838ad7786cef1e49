"""Images with the categories that they show: what every labelled data set becomes, whatever its format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ragged:
    """Lists of integers of different lengths: list i is values[offsets[i]:offsets[i + 1]].

    Attributes:
        offsets: int64 [B + 1], from 0, never falling.
        values: int32 [offsets[-1]].
    """

    offsets: NDArray[np.int64]
    values: NDArray[np.int32]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int] | NDArray[np.integer]]) -> Ragged:
        """The lists of `rows`; each is sorted, without repetitions."""
        unique = [np.unique(np.asarray(row, np.int32)) for row in rows]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in unique])]).astype(np.int64)
        return cls(offsets, np.concatenate([np.empty(0, np.int32), *unique]))

    @classmethod
    def empty(cls, num_rows: int) -> Ragged:
        """So many lists without a value."""
        return cls(np.zeros(num_rows + 1, np.int64), np.empty(0, np.int32))

    @classmethod
    def of_pairs(cls, rows: NDArray[np.integer], values: NDArray[np.integer], num_rows: int) -> Ragged:
        """List r holds the values that stand beside r; each is sorted, without repetitions.

        Args:
            rows: [n], in any order, each below `num_rows`.
            values: [n], from 0 to 2³¹ - 1.
            num_rows: How many lists; those that no pair names are empty.
        """
        pairs = np.unique(np.asarray(rows, np.int64) << 32 | np.asarray(values, np.int64))
        lengths = np.bincount(pairs >> 32, minlength=num_rows)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return cls(offsets, (pairs & 0xFFFFFFFF).astype(np.int32))

    def __len__(self) -> int:
        """How many lists."""
        return len(self.offsets) - 1

    def row(self, index: int) -> NDArray[np.int32]:
        """One list."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def select(self, rows: NDArray[np.integer]) -> Ragged:
        """The lists at these indices, in this order."""
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        picked = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - self.offsets[:-1][rows], lengths)
        return Ragged(offsets, self.values[picked])


class CategoryShare(NamedTuple):
    """How common a category is.

    Attributes:
        name: As it is asked for.
        group: `base` or `novel`.
        num_images: Images that show it; may be 0.
        share: Of all images, 0 to 1.
    """

    name: str
    group: str
    num_images: int
    share: float


@dataclass(frozen=True)
class LabelledImages:
    """A data set: its images in the order of their ids, its categories, and which image shows which.

    Attributes:
        name: What messages and reports call it.
        uris: Unique uris of the images [B], strings.
        categories: Names as they are asked for [V], base ones first; unused categories are left out.
        is_novel: bool [V]; all others are base.
        labels: The categories of each image: indices into `categories`, ascending, unique. May be empty.
        negatives: LVIS: categories that were looked for and are not there; None elsewhere.
        not_exhaustive: LVIS: categories whose instances were not all annotated; None elsewhere.
        images_uri: The folder or prefix that all uris lie under.
    """

    name: str
    uris: pa.ChunkedArray
    categories: tuple[str, ...]
    is_novel: NDArray[np.bool_]
    labels: Ragged
    images_uri: str
    negatives: Ragged | None = None
    not_exhaustive: Ragged | None = None

    def __len__(self) -> int:
        """B."""
        return len(self.uris)

    def relevant(self) -> NDArray[np.bool_]:
        """Whether the image shows the category [V, B]."""
        shown = np.zeros((len(self.categories), len(self)), bool)
        shown[self.labels.values, np.repeat(np.arange(len(self)), np.diff(self.labels.offsets))] = True
        return shown

    def image_counts(self) -> NDArray[np.int64]:
        """How many images show each category [V]."""
        return np.bincount(self.labels.values, minlength=len(self.categories)).astype(np.int64)

    def shares(self) -> list[CategoryShare]:
        """How common each category is, in their order."""
        return [
            CategoryShare(name, "novel" if is_novel else "base", int(count), int(count) / len(self))
            for name, is_novel, count in zip(
                self.categories, self.is_novel.tolist(), self.image_counts(), strict=True
            )
        ]

    def describe(self) -> str:
        """One line: what there is, and how much of it is bare: images without labels, and the reverse."""
        num_novel = int(self.is_novel.sum())
        bare = int((np.diff(self.labels.offsets) == 0).sum())
        unseen = int((self.image_counts() == 0).sum())
        return (
            f"{self.name}: {len(self):,} images ({bare:,} without a label), "
            f"{len(self.categories) - num_novel:,} base and {num_novel:,} novel categories "
            f"({unseen:,} without an image)"
        )
