"""Embed: images → their vectors in the driver's memory, by Ray Data; for measures that compare images.

read_block    CPU tasks: fetch, decode → uint8 pixels, as for an index
EmbedImages   an actor pool, one GPU each where the cluster has GPUs: pixels → the slots that an index stores
embed_images  the driver: 2 bytes a number, as an index keeps them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from for_ray.evaluation.similarity import VectorSets
from for_ray.model.bundle import Bundle
from for_ray.stages.blocks import OK, ImageJob, quarantine, take_pixels
from for_ray.stages.encode import Pool, make_encoded
from for_ray.stages.score import BadImages, unlisted_rows


@dataclass(frozen=True)
class EmbedJob(ImageJob):
    """The job of an embedding.

    Attributes:
        opened: The encoder; files that it names must be where all workers reach them.
    """

    tag: ClassVar[str] = "evaluate"

    opened: Bundle

    @classmethod
    def of(cls, bundle: Bundle, *, device: str, batch_size: int, read_threads: int) -> EmbedJob:
        """The job of a bundle."""
        return cls.of_bundle(
            bundle,
            bundle.name,
            device=device,
            batch_size=batch_size,
            read_threads=read_threads,
            opened=bundle,
        )

    @property
    def actor(self) -> type[Any]:
        """`EmbedImages`."""
        return EmbedImages


def embed_images(
    uris: pa.ChunkedArray, job: EmbedJob, pool: Pool, *, most_bad: float, on_progress: Callable[[int], None]
) -> VectorSets:
    """The distinct slots of images; none where an image cannot be read.

    Args:
        uris: Of the images [B].
        job: The encoder.
        pool: The actors.
        most_bad: More images than this that cannot be read are an error, at the end.
        on_progress: Called with the number of images that came through.

    Raises:
        StageError: More images than `most_bad` are not there or unreadable.
        StorageError: The store refused (from a worker: wrapped by Ray).
    """
    num_images = len(uris)
    found: list[NDArray[np.float16]] = [np.empty((0, job.opened.dim), np.float16)] * num_images
    bad, num_done = BadImages(num_images), 0
    embedded = make_encoded(unlisted_rows(uris), job=job, pool=pool, num_images=num_images)
    for block in embedded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        good = block.filter(pc.and_(pc.equal(block["status"], OK), pc.is_null(block["error"])))
        for row, flat in zip(good["row"].to_pylist(), good["vectors"], strict=True):
            found[row] = flat.values.to_numpy().reshape(-1, job.opened.dim)
        bad.add(block)
        num_done += block.num_rows
        on_progress(num_done)
    bad.check(most_bad)
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in found])]).astype(np.int64)
    return VectorSets(offsets, np.concatenate(found))


class EmbedImages:
    """An encoder on its device: blocks of pixels become vectors.

    Args:
        job: The job.
        num_threads: Threads of the model where it runs on the CPU.
    """

    def __init__(self, job: EmbedJob, num_threads: int) -> None:
        import torch

        from for_ray.model.encoder import load_encoder

        torch.set_num_threads(num_threads)
        self._job = job
        self._encoder = load_encoder(job.opened, job.device)

    def __call__(self, block: pa.Table) -> pa.Table:
        """What `read_block` gives with `vectors` [n · D] for its pixels, float16; empty without any."""
        import torch

        block, pixels = take_pixels(block, self._job.image_size)
        rows: list[NDArray[np.float16]] = []
        for batch in torch.split(pixels, self._job.batch_size) if len(pixels) else ():
            encoded = self._encoder.encode(batch)
            keep = (encoded.keep & encoded.vectors.isfinite().all(dim=-1)).cpu().numpy()
            vectors = encoded.vectors.half().cpu().numpy()
            rows += [each[kept].reshape(-1) for each, kept in zip(vectors, keep, strict=True)]
        is_empty = np.array([not len(row) for row in rows] + [False] * (block.num_rows - len(rows)), bool)
        rows += [np.empty(0, np.float16)] * (block.num_rows - len(rows))
        block = block.append_column("vectors", pa.array(rows, pa.list_(pa.float16())))
        return quarantine(block, is_empty, "the encoder gives no finite vector for this image")
