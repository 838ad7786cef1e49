"""Pseudo-captions on disk: which captions are nearest to which images, and the captions' vectors.

<output>/captions.json        the record; written last: where it lies the table is whole
<output>/captions.parquet     `text` and `vector` of the captions that some image has
<output>/images.parquet       `uri`, `captions` (rows of captions.parquet), `cosines`; the nearest first

The captions are written and read `CAPTIONS_AT_ONCE` at a time. Memory at D = 768: 0.13 GB to write them,
however many there are; to read them, 2·D bytes each for their vectors, and 0.05 GB. While they are written,
they lie on this disk, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from for_ray.datasets.labelled import Ragged
from for_ray.errors import DataError
from for_ray.storage import (
    RangedReader,
    canonical_uri,
    exists,
    join_uri,
    read_bytes,
    shown,
    stat,
    temporary_folder,
    upload,
    write_bytes,
)
from for_ray.storage.refusals import disk_refusals

CAPTIONS_AT_ONCE, IMAGES_AT_ONCE = 4096, 1 << 16
"""Rows of a row group, which is what a writer keeps in memory."""

READ_BYTES = 8 << 20
"""What is read of a column at once."""


class CaptionRun(BaseModel):
    """`captions.json`.

    Attributes:
        identity: Hash of the settings, the images and the captions: another one is another table.
        encoder: Its name.
        fingerprint: Of the encoder that compared images and captions.
        threshold: Cosines at least this high count.
        most: Captions of an image, at most.
        num_images: Of the data set.
        num_unreadable: Of these, that could not be read: they are not in the table.
        num_bare: Of these, without a caption over the threshold: their lists are empty.
        num_captions: That were compared.
        num_used: That some image has.
        recall: Of the nearest captions as a comparison with all has them, the share that the index found for
            some of the images; None where it was not measured.
        nprobe: Lists of the index that were looked at; None where it is not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: str
    encoder: str
    fingerprint: str
    threshold: float
    most: int
    num_images: int
    num_unreadable: int
    num_bare: int
    num_captions: int
    num_used: int
    recall: float | None = None
    nprobe: int | None = None

    def describe(self) -> str:
        """One line."""
        found = "" if self.recall is None else f"; their index finds {self.recall:.1%} of the nearest"
        return (
            f"{self.num_used:,} of {self.num_captions:,} captions are near an image; {self.num_bare:,} of "
            f"{self.num_images:,} images have none of cosine {self.threshold} or more, "
            f"{self.num_unreadable:,} could not be read{found}"
        )


@dataclass(frozen=True)
class CaptionLists:
    """The nearest captions of B images.

    Attributes:
        run: The record of the table.
        uris: Of the images [B].
        of_image: Rows of the C captions that some image has, the nearest first.
        cosines: Of these, in the same order, float32.
    """

    run: CaptionRun
    uris: list[str]
    of_image: Ragged
    cosines: NDArray[np.float32]

    def holds(self, uris: list[str]) -> NDArray[np.bool_]:
        """Whether these images were compared; what could not be read was not."""
        known = set(self.uris)
        return np.array([uri in known for uri in uris], bool)

    def nearest(self, uris: list[str], *, threshold: float, most: int) -> Ragged:
        """For each of these images its nearest captions over the threshold; none where it is not there.

        Args:
            uris: Of images.
            threshold: Cosines at least this high count; the table's own threshold holds, too.
            most: Captions of an image, at most.
        """
        row = {uri: index for index, uri in enumerate(self.uris)}
        empty = np.empty(0, np.int32)
        lists = []
        for uri in uris:
            index = row.get(uri)
            if index is None:
                lists.append(empty)
                continue
            start, end = self.of_image.offsets[index : index + 2]
            near = self.of_image.values[start:end][self.cosines[start:end] >= threshold]
            lists.append(near[:most])
        offsets = np.concatenate([[0], np.cumsum([len(each) for each in lists])]).astype(np.int64)
        return Ragged(offsets, np.concatenate([empty, *lists]).astype(np.int32))


@dataclass(frozen=True)
class CaptionTable(CaptionLists):
    """A read table.

    Attributes:
        vectors: Of the captions [C, D], unit length, float16.
    """

    vectors: NDArray[np.float16]


def record_uri(output_uri: str) -> str:
    """Where the record lies."""
    return join_uri(output_uri, "captions.json")


def write_captions(output_uri: str, lists: CaptionLists, captions: Iterable[pa.Table]) -> None:
    """Write a table, its record last.

    Args:
        output_uri: A folder or prefix.
        lists: The images' captions.
        captions: `text` and `vector` of the captions, in their order, some thousands at a time; at least one.

    Raises:
        StorageError: The store or the disk refused.
    """
    _write(output_uri, "captions", captions, rows_of_group=CAPTIONS_AT_ONCE)
    _write(output_uri, "images", [_image_rows(lists)], rows_of_group=IMAGES_AT_ONCE)
    write_bytes(record_uri(output_uri), lists.run.model_dump_json(indent=1).encode())


def _image_rows(lists: CaptionLists) -> pa.Table:
    offsets = pa.array(lists.of_image.offsets.astype(np.int32))
    return pa.table(
        {
            "uri": pa.array(lists.uris, pa.string()),
            "captions": pa.ListArray.from_arrays(offsets, pa.array(lists.of_image.values)),
            "cosines": pa.ListArray.from_arrays(offsets, pa.array(lists.cosines)),
        }
    )


def read_table(output_uri: str) -> CaptionTable:
    """What `jobs/pseudo_caption.py` wrote to a folder or prefix, but for the captions' texts.

    Raises:
        DataError: Nothing, or not to its end.
        StorageError: The store refused.
    """
    output_uri = canonical_uri(output_uri)
    run = read_record(output_uri)
    vectors = _read_vectors(output_uri)
    with _parquet(output_uri, "images") as file:
        images = file.read()
    lists = images["captions"].combine_chunks()
    of_image = Ragged(lists.offsets.to_numpy().astype(np.int64), lists.values.to_numpy())
    cosines = images["cosines"].combine_chunks().values.to_numpy()
    return CaptionTable(run, images["uri"].to_pylist(), of_image, cosines, vectors)


def _read_vectors(output_uri: str) -> NDArray[np.float16]:
    with _parquet(output_uri, "captions") as file:
        dim = file.schema_arrow.field("vector").type.list_size
        vectors = np.empty((file.metadata.num_rows, dim), np.float16)
        first = 0
        for batch in file.iter_batches(CAPTIONS_AT_ONCE, columns=["vector"], use_threads=False):
            flat = batch.column(0).flatten().to_numpy(zero_copy_only=False)
            vectors[first : first + batch.num_rows] = flat.reshape(-1, dim)
            first += batch.num_rows
    return vectors


def read_record(output_uri: str) -> CaptionRun:
    """The record of a table.

    Raises:
        DataError: There is none, or it is none.
        StorageError: The store refused.
    """
    if not exists(record_uri(output_uri)):
        raise DataError(
            f"no pseudo-captions at {shown(output_uri)}, or not all: jobs/pseudo_caption.py writes them"
        )
    try:
        return CaptionRun.model_validate_json(read_bytes(record_uri(output_uri)))
    except ValidationError as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{record_uri(output_uri)} is no record of pseudo-captions: {reason}") from error


def _write(output_uri: str, name: str, tables: Iterable[pa.Table], *, rows_of_group: int) -> None:
    """By way of this disk: a store takes large files in parts."""
    rest = iter(tables)
    first = next(rest)
    with temporary_folder() as folder:
        path = folder / f"{name}.parquet"
        # A dictionary of numbers that hardly repeat would be larger than they are.
        options = {"compression": "zstd", "use_dictionary": False}
        with disk_refusals("write", path), pq.ParquetWriter(path, first.schema, **options) as file:
            for table in itertools.chain([first], rest):
                file.write_table(table, rows_of_group)
        upload(path, join_uri(output_uri, path.name))


@contextmanager
def _parquet(output_uri: str, name: str) -> Iterator[pq.ParquetFile]:
    uri = join_uri(output_uri, f"{name}.parquet")
    try:
        yield pq.ParquetFile(RangedReader(stat(uri)), buffer_size=READ_BYTES, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{shown(uri)} is no readable Parquet: run jobs/pseudo_caption.py again") from error
