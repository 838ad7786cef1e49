"""The images of a training, and how a worker reads a batch of them: cached features, or pixels.

Where the table of pseudo-labels kept the backbone's features, a batch is one `take` of its rows; else the
images are read and decoded, and the frozen backbone runs again in each epoch.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from for_ray.datasets.labelled import Ragged
from for_ray.datasets.sampling import pad
from for_ray.errors import DataError
from for_ray.index.table import require_table, take_rows
from for_ray.model.encoder_config import EncoderConfig
from for_ray.model.preprocess import decode
from for_ray.schema import LabelRun
from for_ray.storage import read_bytes, read_image

if TYPE_CHECKING:
    from torch import Tensor

BATCHES_AHEAD = 2
"""Batches that are read while one is trained on."""


@dataclass(frozen=True)
class TrainingImages:
    """B images of a training or a measure, and what is known of them; travels to the workers.

    Attributes:
        labels: Categories of each image; empty where they are not to be used.
        is_labelled: Whether `labels` are to be used, bool [B].
        negatives: LVIS: categories that are annotated as absent; None elsewhere.
        table_uri: The table of pseudo-labels; None where there is none.
        table_version: Of the table.
        row_ids: Of the images in the table, int64 [B]; None without a table.
        run: How the table was made.
        uris: Where the images lie [B], strings; None where the table has their features.
        etags: Of the images, strings or null; None where they are not known.
        content: A hash of what the table holds of them; empty without a table.
    """

    labels: Ragged
    is_labelled: NDArray[np.bool_]
    negatives: Ragged | None = None
    table_uri: str | None = None
    table_version: int | None = None
    row_ids: NDArray[np.int64] | None = None
    run: LabelRun | None = None
    uris: pa.Array | None = None
    etags: pa.Array | None = None
    content: str = ""

    def __len__(self) -> int:
        """B."""
        return len(self.is_labelled)

    @property
    def has_features(self) -> bool:
        """Whether the backbone need not run."""
        return self.uris is None

    def select(self, rows: NDArray[np.integer]) -> TrainingImages:
        """The images at these indices, in this order."""
        return replace(
            self,
            labels=self.labels.select(rows),
            is_labelled=self.is_labelled[rows],
            negatives=self.negatives.select(rows) if self.negatives is not None else None,
            row_ids=self.row_ids[rows] if self.row_ids is not None else None,
            uris=self.uris.take(pa.array(rows)) if self.uris is not None else None,
            etags=self.etags.take(pa.array(rows)) if self.etags is not None else None,
        )


class ReadBatch(NamedTuple):
    """What was read of B images, on the CPU.

    tokens: The features, the prefix before the cells [B, T, C], float16; None where pixels were read.
    pixels: [B, 3, S, S] uint8, black where an image is unreadable; None where there are features.
    pseudo: Pseudo-labels [B, T], int64, the most probable first, -1 behind the last.
    is_readable: bool [B].
    """

    tokens: Tensor | None
    pixels: Tensor | None
    pseudo: Tensor
    is_readable: Tensor


class BatchReader:
    """Reads batches of images; threads may share it.

    Args:
        images: Which.
        config: How pixels reach the model.
        with_pseudo: Read pseudo-labels, too.
        threads: Images that are read at once where there are no features.
        is_pinned: Lay tensors where a GPU can fetch them by itself.
    """

    def __init__(
        self,
        images: TrainingImages,
        config: EncoderConfig,
        *,
        with_pseudo: bool,
        threads: int = 16,
        is_pinned: bool = False,
    ) -> None:
        self._images, self._config, self._is_pinned = images, config, is_pinned
        self._columns = (["features"] if images.has_features else []) + (["labels"] if with_pseudo else [])
        self._table = (
            require_table(str(images.table_uri), version=images.table_version) if self._columns else None
        )
        self._pool = None if images.has_features else ThreadPoolExecutor(threads)

    def read(self, rows: NDArray[np.integer]) -> ReadBatch:
        """Read these images.

        Raises:
            DataError: The table does not hold them any more.
            StorageError: The store refused, or the network failed again and again.
        """
        import torch

        taken = self._take(rows)
        pseudo = _pseudo_labels(taken, len(rows))
        tokens = torch.from_numpy(self._features(taken)) if self._images.has_features else None
        pixels, is_readable = None, np.ones(len(rows), bool)
        if tokens is None:
            found, is_readable = self._pixels(rows)
            pixels = torch.from_numpy(found)
        batch = ReadBatch(tokens, pixels, *map(torch.from_numpy, (pseudo, is_readable)))
        if not self._is_pinned:
            return batch
        return ReadBatch(*(part if part is None else part.pin_memory() for part in batch))  # type: ignore[arg-type]

    def batches(self, rows_of_batches: Iterable[NDArray[np.integer]]) -> Iterator[ReadBatch]:
        """Read batch after batch, some ahead of the one that is asked for."""
        return read_ahead(self.read, rows_of_batches, BATCHES_AHEAD)

    def _take(self, rows: NDArray[np.integer]) -> pa.Table | None:
        if self._table is None or self._images.row_ids is None:
            return None
        taken = take_rows(self._table, self._images.row_ids[rows], self._columns)
        if taken.num_rows != len(rows):
            raise DataError(
                f"{self._images.table_uri} does not hold {len(rows) - taken.num_rows} of its images any "
                "more; run jobs/pseudo_label.py, then this again"
            )
        return taken

    def _features(self, taken: pa.Table | None) -> NDArray[np.float16]:
        run = self._images.run
        if taken is None or run is None:
            raise ValueError("features come from a table")
        values = taken["features"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return np.array(values).reshape(-1, run.num_tokens, run.channels)  # a copy: Arrow's is read-only

    def _pixels(self, rows: NDArray[np.integer]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        size = self._config.image_size
        pixels = np.zeros((len(rows), 3, size, size), np.uint8)
        if self._pool is None:
            raise ValueError("this reader reads features")
        decoded = list(self._pool.map(self._decode, rows.tolist()))
        for place, found in enumerate(decoded):
            if found is not None:
                pixels[place] = found
        return pixels, np.array([found is not None for found in decoded], bool)

    def _decode(self, row: int) -> NDArray[np.uint8] | None:
        """Pixels of an image; None where it is gone, changed or no image: the run counts these."""
        try:
            return _decoded(self._images, self._config, row)
        except DataError:
            return None


class Looked(NamedTuple):
    """Some images that were opened: how many, and what is wrong with each that cannot be read."""

    num_images: int
    problems: list[str]


def look_at(images: TrainingImages, config: EncoderConfig, *, most: int) -> Looked:
    """Open some of the images, all over the set.

    Args:
        images: That have uris.
        config: How pixels reach the model.
        most: How many.

    Raises:
        StorageError: The store refused, or the network failed again and again.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).astype(np.int64))

    def problem_of(row: int) -> str | None:
        try:
            _decoded(images, config, row)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(rows)) as pool:
        return Looked(len(rows), [found for found in pool.map(problem_of, rows.tolist()) if found])


def _decoded(images: TrainingImages, config: EncoderConfig, row: int) -> NDArray[np.uint8]:
    """Pixels of an image; `DataError` where it is gone, changed or no image."""
    if images.uris is None:
        raise ValueError("the images have no uris")
    uri, etag = images.uris[row].as_py(), images.etags[row].as_py() if images.etags is not None else None
    raw = read_image(uri, etag) if etag else read_bytes(uri)
    return decode(
        raw,
        image_size=config.image_size,
        resize_mode=config.resize_mode,
        interpolation=config.interpolation,
    ).pixels


def _pseudo_labels(taken: pa.Table | None, num_rows: int) -> NDArray[np.int64]:
    if taken is None or "labels" not in taken.column_names:
        return np.full((num_rows, 1), -1)
    return pad(ragged_of(taken["labels"]))


def ragged_of(column: pa.ChunkedArray) -> Ragged:
    """A column of lists of integers, in their own order; null is an empty list."""
    import pyarrow.compute as pc

    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return Ragged(offsets, values.astype(np.int32))


Item = TypeVar("Item")
Read = TypeVar("Read")


def read_ahead(read: Callable[[Item], Read], items: Iterable[Item], ahead: int) -> Iterator[Read]:
    """What `read` gives for each item, in order; threads read `ahead` of them before they are asked for."""
    coming: Iterator[Item] = iter(items)
    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(ahead) as pool:
        try:
            pending.extend(pool.submit(read, item) for item in itertools.islice(coming, ahead))
            while pending:
                done = pending.popleft().result()
                pending.extend(pool.submit(read, item) for item in itertools.islice(coming, 1))
                yield done
        finally:
            for future in pending:
                future.cancel()
