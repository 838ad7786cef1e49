"""Label: images → pseudo-labels and the backbone's features, as rows of `labels.lance`.

embed_vocabulary   Ray tasks: names → vectors, once a table; and what the encoder's features look like
LabelImages        the actors of the encode stage's dataset: pixels → labels, probabilities, features
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from for_ray.model.bundle import Bundle, open_bundle
from for_ray.schema import LabelRun
from for_ray.stages.blocks import TableJob, quarantine, take_pixels
from for_ray.stages.cluster import Cluster
from for_ray.storage import read_bytes

NAMES_A_TASK = 2_000
"""Names that one task embeds, at least: it loads the encoder first."""

EMBED_RETRIES = 2

NOT_FINITE = "the encoder gives no finite features for this image"


@dataclass(frozen=True)
class LabelJob(TableJob):
    """The job of pseudo-labels.

    Attributes:
        text_uri: The vocabulary's vectors, `vocabulary.safetensors`.
        run: How labels are made; the shape of the features.
    """

    tag: ClassVar[str] = "label"

    text_uri: str
    run: LabelRun

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        bundle_uri: str,
        table: Any,
        *,
        run: LabelRun,
        text_uri: str,
        device: str,
        batch_size: int,
        read_threads: int,
    ) -> LabelJob:
        """The job of a bundle that lies at `bundle_uri`, for a table of labels."""
        return cls.of_bundle(
            bundle,
            bundle_uri,
            device=device,
            batch_size=batch_size,
            read_threads=read_threads,
            table_uri=table.uri,
            schema=table.schema,
            text_uri=text_uri,
            run=run,
        )

    @property
    def actor(self) -> type[Any]:
        """`LabelImages`."""
        return LabelImages

    @property
    def row_bytes(self) -> int:
        """Of labels, probabilities and features."""
        features = 2 * self.run.num_tokens * self.run.channels if self.run.has_features else 0
        return 8 * self.run.num_labels + features


class LabelImages:
    """An encoder and a vocabulary on their device: blocks of pixels become rows of labels.

    Args:
        job: The job.
        num_threads: Threads of the model where it runs on the CPU.
    """

    def __init__(self, job: LabelJob, num_threads: int) -> None:
        import torch
        from safetensors.numpy import load

        from for_ray.model.encoder import load_encoder

        torch.set_num_threads(num_threads)
        self._job = job
        self._encoder = load_encoder(open_bundle(job.bundle_uri, allow_untrained=True), job.device)
        text = load(read_bytes(job.text_uri))["text"]
        self._text = torch.from_numpy(text).to(self._encoder.device)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Add the columns of the labels to what `read_block` gives, and take its pixels away."""
        run = self._job.run
        block, pixels = take_pixels(block, self._job.image_size)
        labelled = self._label(pixels)
        num_valid = len(labelled.labels)
        is_good = np.zeros(block.num_rows, bool)
        is_good[:num_valid] = labelled.is_finite
        counts = np.zeros(block.num_rows, np.int64)
        is_label = (labelled.labels >= 0) & labelled.is_finite[:, None]
        counts[:num_valid] = is_label.sum(axis=1)
        for name, values in (("labels", labelled.labels), ("probabilities", labelled.probabilities)):
            block = block.append_column(name, _lists(values[is_label], counts))
        if run.has_features:
            length = run.num_tokens * run.channels
            features = np.zeros((block.num_rows, length), np.float16)
            features[:num_valid] = labelled.features
            values, is_null = pa.array(features.reshape(-1)), pa.array(~is_good)
            block = block.append_column(
                "features", pa.FixedSizeListArray.from_arrays(values, length, mask=is_null)
            )
        return quarantine(block, ~is_good & (np.arange(block.num_rows) < num_valid), NOT_FINITE)

    def _label(self, pixels: Any) -> _Labelled:
        import torch

        if not len(pixels):
            return _Labelled.nothing(self._job.run)
        # Nothing here waits for the device, so that batches queue up on it; the copies at the end do.
        parts = [self._label_batch(batch) for batch in torch.split(pixels, self._job.batch_size)]
        columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
        return _Labelled(*columns)

    def _label_batch(self, pixels: Any) -> tuple[Any, ...]:
        import torch

        from for_ray.model.pseudo_labels import label_images
        from for_ray.model.slot_model import as_tokens

        run = self._job.run
        with torch.inference_mode():
            encoded, features = self._encoder.encode_with_features(pixels)
            found = label_images(
                encoded.vectors,
                self._text,
                logit_scale=run.logit_scale,
                threshold=run.threshold,
                most=run.num_labels,
            )
            is_finite = encoded.vectors.isfinite().flatten(1).all(dim=1)
            kept = encoded.vectors.new_empty((len(pixels), 0), dtype=torch.float16)
            if run.has_features:
                kept = as_tokens(features).flatten(1).half()  # [B, T · C]
                is_finite &= kept.isfinite().all(dim=1)  # beyond 65,504 float16 is infinite
        return found.labels.int(), found.probabilities, kept, is_finite


class _Labelled(NamedTuple):
    """Labels, probabilities [n, T], -1 and 0 where there is none; features [n, T · C] or [n, 0]; [n]."""

    labels: NDArray[np.int32]
    probabilities: NDArray[np.float32]
    features: NDArray[np.float16]
    is_finite: NDArray[np.bool_]

    @classmethod
    def nothing(cls, run: LabelRun) -> _Labelled:
        """Of no images."""
        length = run.num_tokens * run.channels if run.has_features else 0
        empty = np.empty((0, run.num_labels))
        return cls(
            empty.astype(np.int32),
            empty.astype(np.float32),
            np.empty((0, length), np.float16),
            np.empty(0, bool),
        )


def _lists(values: NDArray[Any], counts: NDArray[np.int64]) -> pa.ListArray:
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(values))


class Embedded(NamedTuple):
    """A vocabulary's vectors, and what had to be known of the encoder.

    text: [V, D], float32, unit length.
    logit_scale: What cosines are multiplied with.
    num_prefix: P of its features.
    height: Of the feature map, in cells.
    width: Of the feature map, in cells.
    channels: C.
    """

    text: NDArray[np.float32]
    logit_scale: float
    num_prefix: int
    height: int
    width: int
    channels: int


def embed_vocabulary(
    cluster: Cluster,
    bundle_uri: str,
    names: Sequence[str],
    *,
    device: str,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Embedded:
    """Embed names in tasks, on GPUs where there are some: 20,000 names are 140,000 texts.

    Args:
        cluster: Where the tasks run.
        bundle_uri: The encoder, where all workers can read it.
        names: V names, at least one.
        device: `auto` takes the GPUs that are there, `cuda` also those that come when asked for, `cpu` none.
        on_progress: Called with the number of names that are done.
    """
    import ray

    num_gpus = 0 if device == "cpu" else 1 if device == "cuda" else cluster.task_gpus
    num_cpus = 1 if num_gpus else cluster.task_cpus
    room = cluster.resources.get("GPU" if num_gpus else "CPU", 1) // (num_gpus or num_cpus)
    num_tasks = max(1, min(int(room), len(names) // NAMES_A_TASK))
    task = ray.remote(_embed).options(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=EMBED_RETRIES)
    edges = [number * len(names) // num_tasks for number in range(num_tasks + 1)]
    spans = list(itertools.pairwise(edges))
    on_device = "cpu" if device == "cpu" else "auto"
    waiting = [task.remote(bundle_uri, list(names[a:b]), on_device, num_cpus) for a, b in spans]
    sizes = {reference: b - a for reference, (a, b) in zip(waiting, spans, strict=True)}
    done, open_tasks = 0, list(waiting)
    while open_tasks:
        finished, open_tasks = ray.wait(open_tasks)
        ray.get(finished)  # raises at once what a task raised
        done += sum(sizes[reference] for reference in finished)
        on_progress(done)
    parts: list[Embedded] = ray.get(waiting)
    return parts[0]._replace(text=np.concatenate([part.text for part in parts]))


def _embed(bundle_uri: str, names: list[str], device: str, num_threads: int) -> Embedded:
    import torch

    from for_ray.model.encoder import load_encoder

    torch.set_num_threads(num_threads)
    encoder = load_encoder(open_bundle(bundle_uri, allow_untrained=True), device)
    size = encoder.image_size
    with torch.inference_mode():
        features = encoder.features(torch.zeros((1, 3, size, size), dtype=torch.uint8))
    return Embedded(
        encoder.embed_text(names),
        encoder.logit_scale,
        num_prefix=features.prefix.shape[1],
        height=features.height,
        width=features.width,
        channels=features.cells.shape[2],
    )
