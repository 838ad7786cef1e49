"""What every worker of a tuning of CLIP's towers has to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from for_ray.datasets.labelled import Ragged
from for_ray.model.tower_tuning import AdamWSettings, TuneSettings
from for_ray.stages.tower_val import TowerVal
from for_ray.stages.training_images import TrainingImages


@dataclass(frozen=True)
class TowerJob:
    """One tuning; travels to the workers.

    Attributes:
        bundle_uri: The encoder that it begins with.
        vectors_uri: `realign`: where the locked tower's vectors are kept, so that a restart finds them.
        tune: What is trained, and against what.
        adam: How.
        epochs: How many.
        batch_size: Images of a global batch at most.
        seed: Of the order, and of the captions that are drawn.
        precision: Of the computation.
        images: What is trained on; with one label each but for `realign`.
        num_classes: V.
        of_image: The captions of each image; empty lists for `gpr`.
        caption_vectors: `mcip`: of the captions [C, D], unit length, float16; None elsewhere.
        caption_texts: `realign`: the captions themselves; empty elsewhere.
        val: What each epoch is measured on; None: nothing.
        read_threads: Images that are read at once.
        max_bad_fraction: Share of the images that may be unreadable, of either set.
        grad_checkpointing: Whether activations are computed twice, so that fewer are kept.
    """

    bundle_uri: str
    vectors_uri: str
    tune: TuneSettings
    adam: AdamWSettings
    epochs: int
    batch_size: int
    seed: int
    precision: Literal["auto", "float32", "float16", "bfloat16"]
    images: TrainingImages
    num_classes: int
    of_image: Ragged
    caption_vectors: NDArray[np.float16] | None = None
    caption_texts: tuple[str, ...] = ()
    val: TowerVal | None = None
    read_threads: int = 16
    max_bad_fraction: float = 0.05
    grad_checkpointing: bool = False
