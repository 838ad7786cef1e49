"""Score: images and names → how near each image comes to each name, by Ray Data; nothing is written.

read_block    CPU tasks: fetch, decode → uint8 pixels, as for an index
ScoreImages   an actor pool, one GPU each where the cluster has GPUs: pixels → slots → [V] cosines
score_images  the driver: [V, B], 4 bytes each
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from for_ray.errors import StageError
from for_ray.model.bundle import Bundle
from for_ray.stages.blocks import CHANGED, GONE, OK, ImageJob, quarantine, take_pixels
from for_ray.stages.encode import Pool, make_encoded
from for_ray.storage import shown

if TYPE_CHECKING:
    from torch import Tensor

WORST_CAUSES = 3
"""Reasons that the message of a run with too many unreadable images names."""


@dataclass(frozen=True)
class ScoreJob(ImageJob):
    """The job of an evaluation: one encoder, and what is asked for.

    Attributes:
        opened: The encoder itself, so that nothing has to be written; files that it names must be where
            all workers reach them.
        names: The categories [V], in their order.
        are_captions: They are embedded as they stand, without prompts.
    """

    tag: ClassVar[str] = "evaluate"

    opened: Bundle
    names: tuple[str, ...]
    are_captions: bool = False

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        names: tuple[str, ...],
        *,
        device: str,
        batch_size: int,
        read_threads: int,
        are_captions: bool = False,
    ) -> ScoreJob:
        """The job of a bundle and these names."""
        return cls.of_bundle(
            bundle,
            bundle.name,
            device=device,
            batch_size=batch_size,
            read_threads=read_threads,
            opened=bundle,
            names=names,
            are_captions=are_captions,
        )

    @property
    def actor(self) -> type[Any]:
        """`ScoreImages`."""
        return ScoreImages


class Scores(NamedTuple):
    """How near images come to names.

    Attributes:
        values: Highest cosine over the image's slots [V, B], float32; of no meaning where `is_read` is False.
        is_read: Whether the image could be read and encoded [B].
    """

    values: NDArray[np.float32]
    is_read: NDArray[np.bool_]


def score_images(
    uris: pa.ChunkedArray, job: ScoreJob, pool: Pool, *, most_bad: float, on_progress: Callable[[int], None]
) -> Scores:
    """Encode images and compare them with the job's names.

    Args:
        uris: Of the images [B].
        job: The encoder and the names.
        pool: The actors.
        most_bad: More images than this that cannot be read are an error; it comes at the end, with the number
            of all of them.
        on_progress: Called with the number of images that came through.

    Raises:
        StageError: More images than `most_bad` are not there or unreadable.
        StorageError: The store refused (from a worker: wrapped by Ray).
    """
    num_images = len(uris)
    rows = unlisted_rows(uris)
    values = np.zeros((len(job.names), num_images), np.float32)
    is_read = np.zeros(num_images, bool)
    bad = BadImages(num_images)
    num_done = 0
    scored = make_encoded(rows, job=job, pool=pool, num_images=num_images)
    for block in scored.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        good = block.filter(pc.and_(pc.equal(block["status"], OK), pc.is_null(block["error"])))
        columns = good["row"].to_numpy()
        values[:, columns] = _matrix(good["scores"], len(job.names)).T
        is_read[columns] = True
        bad.add(block)
        num_done += block.num_rows
        on_progress(num_done)
    bad.check(most_bad)
    return Scores(values, is_read)


def unlisted_rows(uris: pa.ChunkedArray) -> pa.Table:
    """Images as a listing would give them, though there was none to hold them to, with their `row`."""
    num_images = len(uris)
    return pa.table(
        {
            "uri": uris,
            "etag": pa.array(np.full(num_images, ""), pa.string()),
            "size_bytes": pa.nulls(num_images, pa.int64()),
            "row": np.arange(num_images),
        }
    )


class ScoreImages:
    """An encoder and a list of names on its device: blocks of pixels become cosines.

    Args:
        job: The job.
        num_threads: Threads of the model where it runs on the CPU.
    """

    def __init__(self, job: ScoreJob, num_threads: int) -> None:
        import torch

        from for_ray.model.encoder import load_encoder

        torch.set_num_threads(num_threads)
        self._job = job
        self._encoder = load_encoder(job.opened, job.device)
        embed = self._encoder.embed_captions if job.are_captions else self._encoder.embed_text
        self._text = torch.from_numpy(embed(job.names)).to(self._encoder.device)

    def __call__(self, block: pa.Table) -> pa.Table:
        """What `read_block` gives with `scores` [V] for its pixels; null without any."""
        import torch

        block, pixels = take_pixels(block, self._job.image_size)
        scores = np.full((block.num_rows, len(self._job.names)), -np.inf, np.float32)
        if len(pixels):
            # Nothing here waits for the device; the copy back at the end does.
            parts = [self._score(batch) for batch in torch.split(pixels, self._job.batch_size)]
            scores[: len(pixels)] = torch.cat(parts).cpu().numpy()
        is_empty = ~np.isfinite(scores).all(axis=1)
        values = pa.FixedSizeListArray.from_arrays(pa.array(scores.reshape(-1)), scores.shape[1])
        block = block.append_column("scores", values)
        is_empty &= np.arange(block.num_rows) < len(pixels)
        return quarantine(block, is_empty, "the encoder gives no finite vector for this image")

    def _score(self, pixels: Tensor) -> Tensor:
        """The highest cosine over the slots that an index would store [b, V]."""
        import torch

        encoded = self._encoder.encode(pixels)
        vectors = encoded.vectors.float()
        is_kept = encoded.keep & vectors.isfinite().all(dim=-1)
        cosines = vectors.nan_to_num() @ self._text.T  # [b, N, D] · [D, V] -> [b, N, V]
        return torch.where(is_kept[..., None], cosines, -torch.inf).amax(dim=1)


def _matrix(column: pa.ChunkedArray, width: int) -> NDArray[np.float32]:
    flat = column.combine_chunks().flatten()
    return np.asarray(flat.to_numpy(zero_copy_only=False), np.float32).reshape(-1, width)


class BadImages:
    """The images that cannot be measured, and why, as far as a message tells it."""

    def __init__(self, num_images: int) -> None:
        self._num_images = num_images
        self._causes: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, block: pa.Table) -> None:
        """Count a block's."""
        for uri, status, error in zip(
            *(block[name].to_pylist() for name in ("uri", "status", "error")), strict=True
        ):
            if cause := "not there" if status in (GONE, CHANGED) else error:
                cause = cause.split(":")[0]
                self._causes[cause] += 1
                self._examples.setdefault(cause, uri)

    def check(self, most: float) -> None:
        """Raise `StageError` when there are more than `most`."""
        num_bad = self._causes.total()
        if num_bad > most:
            causes = "; ".join(
                f"{count:,} × {cause} ({shown(self._examples[cause])})"
                for cause, count in self._causes.most_common(WORST_CAUSES)
            )
            raise StageError(
                "score",
                f"{num_bad:,} of the data set's {self._num_images:,} images cannot be measured, more than "
                f"max_bad_fraction allows ({most:,.0f}); mend them, correct where the images lie, or "
                f"raise it. Worst: {causes}",
            )
