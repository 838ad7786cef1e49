"""CLIP's towers while they are tuned, and the vectors that all workers compute together with them.

Each computes its part, all get all: worker r of n has the rows r, r + n, …, which may be none. Memory: all
vectors as float16, 2 · B · D bytes, on the CPU of each worker, and its own part once more while they are put
together; on its device some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from for_ray.errors import StorageError
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.model.text import embed_names, make_tokenizer
from for_ray.model.tower_tuning import embed, load_clip
from for_ray.stages.tower_job import TowerJob
from for_ray.stages.training_images import BatchReader, ReadBatch, TrainingImages
from for_ray.stages.training_run import choose_dtype

if TYPE_CHECKING:
    from torch import Tensor

TEXTS_AT_ONCE = 512

ROWS_AT_ONCE = 1 << 16
"""Of all workers, that lie on a device while they are put together."""


class Embedded(NamedTuple):
    """Images, on the CPU, the same on all workers.

    vectors: Unit length [B, D], float16; of no meaning where an image could not be read.
    is_readable: bool [B].
    """

    vectors: Tensor
    is_readable: Tensor


class SharedTowers:
    """Both towers on a worker's device; all workers call the same methods at the same time.

    Args:
        job: The tuning.
        device: Where this worker computes.
        rank: Which worker this is.
        world: How many there are; above 1 torch's process group must be there.

    Raises:
        ConfigError: The weights can't be had, or don't fit.
        DataError: A file is not what its checksum says.
        StorageError: The store refused.
    """

    def __init__(self, job: TowerJob, *, device: str, rank: int = 0, world: int = 1) -> None:
        import torch

        self._job, self.rank, self.world = job, rank, world
        self.bundle: Bundle = open_bundle(job.bundle_uri)
        self.device = torch.device(device)
        self.dtype = choose_dtype(job.precision, self.device)
        self.clip = load_clip(self.bundle).to(self.device)
        self._layout = torch.contiguous_format
        if self.device.type == "cuda":  # convolutions of low precision want it so
            self._layout = torch.channels_last
            self.clip.to(memory_format=torch.channels_last)
        config = self.bundle.config
        self._mean, self._std = (
            255 * torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in (config.mean, config.std)
        )
        self._tokenize: Callable[[list[str]], Tensor] | None = None

    def reader(self, images: TrainingImages) -> BatchReader:
        """Reads the pixels of images."""
        return BatchReader(
            images,
            self.bundle.config,
            with_pseudo=False,
            threads=self._job.read_threads,
            is_pinned=self.device.type == "cuda",
        )

    def normalised(self, read: ReadBatch) -> Tensor:
        """Pixels as the image tower takes them, on the device [b, 3, S, S]."""
        if read.pixels is None:
            raise ValueError("the towers are tuned from pixels")
        pixels = read.pixels.to(self.device, non_blocking=True).float()
        return ((pixels - self._mean) / self._std).contiguous(memory_format=self._layout)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids [n, L], on the device; what is too long is cut off."""
        if self._tokenize is None:
            self._tokenize = make_tokenizer(self.bundle.model_config["text_cfg"], self.bundle.name)
        return self._tokenize(list(texts)).to(self.device)

    def embed_images(self, images: TrainingImages, *, goes_on: bool = False) -> Embedded:
        """Images by the image tower.

        Args:
            images: That have uris.
            goes_on: Where the store refuses, this worker's images from there on count as unreadable.

        Raises:
            StorageError: The store refused, or the network failed again and again.
        """
        import torch

        rows = np.arange(len(images))[self.rank :: self.world]
        num_parts = min(len(rows), -(-len(rows) * self.world // self._job.batch_size))
        parts = np.array_split(rows, num_parts) if num_parts else []
        vectors = torch.zeros(len(rows), self.bundle.dim, dtype=torch.float16)
        is_readable = torch.zeros(len(rows), dtype=torch.bool)
        done = 0
        try:
            for read in self.reader(images).batches(parts):
                some = slice(done, done + len(read.is_readable))
                pixels = self.normalised(read)
                vectors[some] = embed(self.clip, [pixels], dim=self.bundle.dim, dtype=self.dtype).cpu()
                is_readable[some], done = read.is_readable, some.stop
        except StorageError:
            if not goes_on:
                raise
        return Embedded(*(self.gather(mine, len(images)) for mine in (vectors, is_readable)))

    def embed_names(self, names: Sequence[str]) -> NDArray[np.float16]:
        """Names by the text tower, through the bundle's prompts: unit vectors [V, D]; computed in float32."""
        return self._embed_texts(
            names,
            lambda mine: embed_names(
                mine,
                prompts=self.bundle.config.prompts,
                tokenize=self.tokens,
                encode_text=self.clip.encode_text,  # type: ignore[arg-type]
            ),
        )

    def embed_captions(self, captions: Sequence[str]) -> NDArray[np.float16]:
        """Captions by the text tower, as they stand: unit vectors [C, D]; computed in float32."""
        from torch.nn import functional

        def embed_some(mine: Sequence[str]) -> Tensor:
            encoded = self.clip.encode_text(self.tokens(mine))  # type: ignore[operator]
            return functional.normalize(encoded.float(), dim=-1)

        return self._embed_texts(captions, embed_some)

    def _embed_texts(
        self, texts: Sequence[str], embed_some: Callable[[Sequence[str]], Tensor]
    ) -> NDArray[np.float16]:
        import torch

        mine = texts[self.rank :: self.world]
        vectors = torch.zeros(len(mine), self.bundle.dim, dtype=torch.float16)
        with torch.inference_mode():
            for start in range(0, len(mine), TEXTS_AT_ONCE):
                some = slice(start, start + TEXTS_AT_ONCE)
                vectors[some] = embed_some(mine[some]).cpu()
        return self.gather(vectors, len(texts)).numpy()

    def gather(self, mine: Tensor, num_rows: int) -> Tensor:
        """All rows [B, …], on the CPU."""
        import torch

        if self.world == 1:
            return mine.cpu()
        from torch import distributed

        found = torch.zeros(num_rows, *mine.shape[1:], dtype=mine.dtype)
        most, step = -(-num_rows // self.world), max(1, ROWS_AT_ONCE // self.world)
        for start in range(0, most, step):
            some = mine[start : start + step]
            # Tensors of one shape go without being pickled.
            padded = torch.zeros(
                min(step, most - start), *mine.shape[1:], dtype=mine.dtype, device=self.device
            )
            padded[: len(some)] = some
            parts = [torch.empty_like(padded) for _ in range(self.world)]
            distributed.all_gather(parts, padded)
            for rank, part in enumerate(parts):
                rows = found[rank :: self.world][start : start + step]
                rows.copy_(part[: len(rows)])
        return found

    def sum(self, mine: Sequence[float]) -> list[float]:
        """Each value over all workers, which give as many; counts stay exact."""
        import torch

        if self.world == 1:
            return list(mine)
        from torch import distributed

        totals = torch.tensor(mine, dtype=torch.float64, device=self.device)
        distributed.all_reduce(totals)
        return totals.tolist()
