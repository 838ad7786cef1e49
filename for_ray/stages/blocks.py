"""What the workers of a stage do with a block of images that has been read: encode, write.

A job says what they have to know: `ImageJob` where an encoder looks at images, `TableJob` where rows of a
table come of it, `EncodeJob` where these are the vectors of an index. Other stages bring jobs of their own.
"""

from __future__ import annotations

import datetime
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from for_ray.index.table import write_fragments
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.model.preprocess import Interpolation, ResizeMode, uncrop_boxes
from for_ray.schema import BOXES_TYPE, pack_boxes, vectors_type

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_BYTES = 48 * 2**20
"""Pixels of a block, at most: the unit of transport, of a retry and of what a dead worker loses."""

FRAGMENT_BYTES = 128 * 2**20
"""Vectors of a fragment, at most: what a writing task holds in memory."""

OK, GONE, CHANGED, DENIED = range(4)
"""The `status` of a row on its way: to be stored, or passed over: deleted, replaced since the listing, not
readable, nor anything beside it. The next run meets what is passed over again."""


@dataclass(frozen=True)
class ImageJob:
    """What every worker has to know where an encoder looks at images.

    Attributes:
        bundle_uri: The encoder, where all workers can read it.
        image_size: Side of the model's input in pixels.
        resize_mode: How an image becomes a square; `preprocess` knows.
        interpolation: Of the resize.
        device: Where the actors encode: `auto` or `cpu`.
        batch_size: Images that the model takes at once.
        read_threads: Objects that a reading task fetches at once.
        tag: What Prometheus metrics call the job.
    """

    tag: ClassVar[str]

    bundle_uri: str
    image_size: int
    resize_mode: ResizeMode
    interpolation: Interpolation
    device: str
    batch_size: int
    read_threads: int

    @classmethod
    def of_bundle(
        cls,
        bundle: Bundle,
        bundle_uri: str,
        *,
        device: str,
        batch_size: int,
        read_threads: int,
        **more: Any,
    ) -> Self:
        """The job of a bundle that lies at `bundle_uri`; `more` are the fields that a subclass adds."""
        return cls(
            bundle_uri=bundle_uri,
            image_size=bundle.image_size,
            resize_mode=bundle.resize_mode,
            interpolation=bundle.config.interpolation,
            device="cpu" if device == "cpu" else "auto",
            batch_size=batch_size,
            read_threads=read_threads,
            **more,
        )

    @property
    def actor(self) -> type[Any]:
        """The actors' class, made of (job, threads of the model on a CPU).

        Called with what `read_block` gives; it answers with a block that has the pixels no more.
        """
        raise NotImplementedError

    def block_rows(self, num_images: int, num_actors: int) -> int:
        """Images of a block: whole batches, bounded by memory, and enough blocks to keep every actor busy."""
        by_memory = BLOCK_BYTES // (3 * self.image_size**2)
        by_share = -(-num_images // (4 * num_actors))
        return max(1, min(by_memory, by_share) // self.batch_size) * self.batch_size


@dataclass(frozen=True)
class TableJob(ImageJob):
    """An `ImageJob` whose blocks are written as rows of a table.

    Attributes:
        table_uri: The table that the rows are for; it exists.
        schema: Its columns.
    """

    table_uri: str
    schema: pa.Schema

    @property
    def row_bytes(self) -> int:
        """What a row takes, at most, in its large columns."""
        raise NotImplementedError

    def fragment_rows(self, num_images: int) -> int:
        """Images of a fragment: few large files for many images, early commits for few."""
        by_memory = FRAGMENT_BYTES // self.row_bytes
        return max(1, min(by_memory, max(256, num_images // 200), 8192))


@dataclass(frozen=True)
class EncodeJob(TableJob):
    """The job of the index: vectors and boxes.

    Attributes:
        num_slots: Vectors of an image at most.
        dim: D.
    """

    tag: ClassVar[str] = "index"

    num_slots: int
    dim: int

    @classmethod
    def of(
        cls, bundle: Bundle, bundle_uri: str, table: Any, *, device: str, batch_size: int, read_threads: int
    ) -> EncodeJob:
        """The job of a bundle that lies at `bundle_uri`, for a table of its vectors."""
        return cls.of_bundle(
            bundle,
            bundle_uri,
            device=device,
            batch_size=batch_size,
            read_threads=read_threads,
            table_uri=table.uri,
            schema=table.schema,
            num_slots=bundle.num_slots,
            dim=bundle.dim,
        )

    @property
    def actor(self) -> type[Any]:
        """`EncodeImages`."""
        return EncodeImages

    @property
    def row_bytes(self) -> int:
        """Of the vectors."""
        return self.num_slots * self.dim * 2


class EncodeCounts(NamedTuple):
    """What came out: rows stored (with those quarantined), quarantined, gone, changed meanwhile, denied."""

    stored: int = 0
    quarantined: int = 0
    gone: int = 0
    changed: int = 0
    denied: int = 0

    @classmethod
    def of(cls, written: pa.Table) -> EncodeCounts:
        """The counts in a row that `write_block` gives."""
        return cls(*(written[name][0].as_py() for name in cls._fields))

    def plus(self, other: EncodeCounts) -> EncodeCounts:
        """The sum, field by field."""
        return EncodeCounts(*(mine + its for mine, its in zip(self, other, strict=True)))

    @property
    def skipped(self) -> int:
        """Rows of images that were deleted or replaced between the listing and the reading, or denied."""
        return self.gone + self.changed + self.denied

    @property
    def told(self) -> str:
        """What a run says at its end of the rows that were skipped."""
        missing, text = self.gone + self.changed, ""
        if missing:
            text = f"; {missing:,} images were not there, or not as listed, when they were read"
        if self.denied:
            text += f"; {self.denied:,} images could not be read and are tried again by the next run"
        return text

    @property
    def total(self) -> int:
        """Rows that went through the stage."""
        return self.stored + self.skipped


# Encoding: an actor


class EncodeImages:
    """An encoder on its device: blocks of pixels become rows of the table.

    Args:
        job: The job.
        num_threads: Threads of the model where it runs on the CPU.
    """

    def __init__(self, job: EncodeJob, num_threads: int) -> None:
        import torch

        from for_ray.model.encoder import load_encoder

        torch.set_num_threads(num_threads)
        self._job = job
        self._encoder = load_encoder(open_bundle(job.bundle_uri, allow_untrained=True), job.device)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Add `vectors` and `boxes` to what `read_block` gives, and take its pixels away."""
        block, pixels = take_pixels(block, self._job.image_size)
        widths, heights = (block[name].to_numpy()[: len(pixels)] for name in ("width", "height"))
        vectors, boxes, keep = self._encode(pixels, widths, heights)
        counts = np.zeros(block.num_rows, np.int64)
        counts[: len(pixels)] = keep.sum(axis=1)
        kept_vectors, kept_boxes = vectors[keep], pack_boxes(boxes[keep])
        block = block.append_column("vectors", _lists(kept_vectors, counts, vectors_type(self._job.dim)))
        block = block.append_column("boxes", _lists(kept_boxes, counts, BOXES_TYPE))
        is_empty = (counts == 0) & (np.arange(block.num_rows) < len(pixels))
        return quarantine(block, is_empty, "the encoder gives no finite vector for this image")

    def _encode(
        self, pixels: Tensor, widths: NDArray[np.number], heights: NDArray[np.number]
    ) -> tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.bool_]]:
        import torch

        job = self._job
        if not len(pixels):
            empty = (0, job.num_slots)
            return (
                np.empty((*empty, job.dim), np.float16),
                np.empty((*empty, 4), np.float32),
                np.empty(empty, bool),
            )
        # Nothing here waits for the device, so that batches queue up on it; the copy back at the end does.
        parts = [self._encoder.encode(batch) for batch in torch.split(pixels, job.batch_size)]
        vectors = torch.cat([part.vectors for part in parts])
        keep = torch.cat([part.keep for part in parts]) & vectors.isfinite().all(dim=-1)
        boxes = torch.cat([part.boxes for part in parts]).float().cpu().numpy()
        boxes = uncrop_boxes(boxes, widths, heights, resize_mode=job.resize_mode)
        return vectors.half().cpu().numpy(), boxes, keep.cpu().numpy()


def take_pixels(block: pa.Table, image_size: int) -> tuple[pa.Table, Tensor]:
    """The rows of `read_block` without their pixels, and these [n, 3, S, S] uint8: of the first n rows.

    Ray puts blocks together, and cuts them, to make batches: the rows are brought into order here, those that
    have pixels first.

    Args:
        block: One block, or rows of several.
        image_size: S.
    """
    import torch

    has_pixels = np.asarray(pc.is_valid(block["width"]))
    num_valid = int(has_pixels.sum())
    if not has_pixels[:num_valid].all():
        block = block.take(np.argsort(~has_pixels, kind="stable"))
    flat = block["pixels"].combine_chunks().flatten().to_numpy(zero_copy_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Ray's store is read-only; nothing writes to the tensor
        pixels = torch.from_numpy(flat.reshape(-1, 3, image_size, image_size)[:num_valid])
    return block.drop_columns(["pixels"]), pixels


def _lists(values: NDArray[Any], counts: NDArray[np.int64], kind: pa.DataType) -> pa.ListArray:
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    items = pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1]
    )
    return pa.ListArray.from_arrays(offsets, items).cast(kind)


def quarantine(block: pa.Table, is_bad: NDArray[np.bool_], reason: str) -> pa.Table:
    """The block with `reason` as the `error` of its bad rows [rows]."""
    if not is_bad.any():
        return block
    errors = pc.if_else(pa.array(is_bad), pa.scalar(reason), block["error"])
    return block.set_column(block.column_names.index("error"), "error", errors)


# Writing: a task


def write_block(block: pa.Table, *, job: TableJob) -> pa.Table:
    """Write rows as files of the table; one row comes back, with the fragments as JSON and the counts."""
    status = block["status"]
    stored = block.filter(pc.equal(status, OK))
    now = datetime.datetime.now(datetime.UTC)
    stored = stored.append_column(
        "encoded_at", pa.array([now] * stored.num_rows, pa.timestamp("us", tz="UTC"))
    )
    for name in set(job.schema.names) - set(stored.column_names):
        stored = stored.append_column(name, pa.nulls(stored.num_rows, job.schema.field(name).type))
    rows = stored.select(job.schema.names).cast(job.schema)
    fragments = write_fragments(rows, job.table_uri) if rows.num_rows else []
    counts = EncodeCounts(
        stored=rows.num_rows,
        quarantined=rows.num_rows - rows["error"].null_count,
        gone=pc.sum(pc.equal(status, GONE)).as_py() or 0,
        changed=pc.sum(pc.equal(status, CHANGED)).as_py() or 0,
        denied=pc.sum(pc.equal(status, DENIED)).as_py() or 0,
    )
    return pa.table({"fragments": [fragments], **{name: [count] for name, count in counts._asdict().items()}})
