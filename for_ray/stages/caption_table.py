"""Pseudo-captions on disk: which captions are nearest to which images, and the captions' vectors.

<output>/captions.json        the record; written last: where it lies the table is whole
<output>/captions.parquet     `text` and `vector` of the captions that some image has
<output>/images.parquet       `uri`, `captions` (rows of captions.parquet), `cosines`; the nearest first
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from for_ray.datasets.labelled import Ragged
from for_ray.errors import DataError
from for_ray.storage import canonical_uri, exists, join_uri, read_bytes, shown, write_bytes


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
class CaptionTable:
    """A read table.

    Attributes:
        run: Its record.
        uris: Of the images [B].
        of_image: Rows of `texts`, the nearest first.
        cosines: Of these, in the same order, float32.
        texts: Of the captions [C].
        vectors: Of the captions [C, D], unit length, float16.
    """

    run: CaptionRun
    uris: list[str]
    of_image: Ragged
    cosines: NDArray[np.float32]
    texts: list[str]
    vectors: NDArray[np.float16]

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


def record_uri(output_uri: str) -> str:
    """Where the record lies."""
    return join_uri(output_uri, "captions.json")


def write_captions(output_uri: str, table: CaptionTable) -> None:
    """Write a table, its record last.

    Raises:
        StorageError: The store or the disk refused.
    """
    dim = table.vectors.shape[1]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(table.vectors.reshape(-1)), dim)
    _write(output_uri, "captions", pa.table({"text": pa.array(table.texts, pa.string()), "vector": vectors}))
    offsets = pa.array(table.of_image.offsets.astype(np.int32))
    lists = {
        "captions": pa.ListArray.from_arrays(offsets, pa.array(table.of_image.values)),
        "cosines": pa.ListArray.from_arrays(offsets, pa.array(table.cosines)),
    }
    _write(output_uri, "images", pa.table({"uri": pa.array(table.uris, pa.string()), **lists}))
    write_bytes(record_uri(output_uri), table.run.model_dump_json(indent=1).encode())


def read_table(output_uri: str) -> CaptionTable:
    """What `jobs/pseudo_caption.py` wrote to a folder or prefix.

    Raises:
        DataError: Nothing, or not to its end.
        StorageError: The store refused.
    """
    output_uri = canonical_uri(output_uri)
    run = read_record(output_uri)
    captions, images = (_read(output_uri, name) for name in ("captions", "images"))
    lists = images["captions"].combine_chunks()
    of_image = Ragged(lists.offsets.to_numpy().astype(np.int64), lists.values.to_numpy())
    flat = captions["vector"].combine_chunks().flatten().to_numpy()
    return CaptionTable(
        run,
        images["uri"].to_pylist(),
        of_image,
        images["cosines"].combine_chunks().values.to_numpy(),
        captions["text"].to_pylist(),
        flat.reshape(captions.num_rows, -1),
    )


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


def _write(output_uri: str, name: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(join_uri(output_uri, f"{name}.parquet"), sink.getvalue().to_pybytes())


def _read(output_uri: str, name: str) -> Any:
    uri = join_uri(output_uri, f"{name}.parquet")
    try:
        return pq.read_table(pa.BufferReader(read_bytes(uri)))
    except pa.ArrowInvalid as error:
        raise DataError(f"{shown(uri)} is no readable Parquet: run jobs/pseudo_caption.py again") from error
