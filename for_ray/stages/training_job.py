"""What every worker of a fine-tuning has to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from for_ray.datasets.labelled import Ragged
from for_ray.model.finetuning import AdamSettings
from for_ray.model.objectives import LossSettings
from for_ray.model.slot_model import Freeze
from for_ray.stages.training_images import TrainingImages


@dataclass(frozen=True)
class FinetuneJob:
    """One fine-tuning: what is trained, on what, how, and how it is measured; travels to the workers.

    Attributes:
        bundle_uri: The encoder whose head is trained, from `untrained_bundle`.
        freeze: What of the pooling layer is not trained.
        losses: What is minimised.
        adam: How.
        dropout: Of the head.
        epochs: How many.
        batch_size: Images of a global batch at most.
        seed: Of order, dropout and sampling; that of the head's weights is in its bundle.
        precision: Of the computation.
        categories: The names of the base categories [V]: those of L_sup.
        names_text_uri: Where the vectors of the pseudo-labels' names lie; None without L_pse.
        train: What is trained on.
        held_out: What is kept from it; None: nothing.
        held_out_pseudo: The pseudo-labels of these; None without any.
        val: Validation images; None: none.
        val_categories: Names of their categories.
        val_is_novel: Which of these are novel, bool.
        select: Which epoch becomes the bundle.
        read_threads: Images that are read at once where there are no features.
        max_bad_fraction: Share of the images that may be unreadable.
    """

    bundle_uri: str
    freeze: Freeze
    losses: LossSettings
    adam: AdamSettings
    dropout: float
    epochs: int
    batch_size: int
    seed: int
    precision: Literal["auto", "float32", "float16", "bfloat16"]
    categories: tuple[str, ...]
    names_text_uri: str | None
    train: TrainingImages
    held_out: TrainingImages | None = None
    held_out_pseudo: Ragged | None = None
    val: TrainingImages | None = None
    val_categories: tuple[str, ...] = ()
    val_is_novel: NDArray[np.bool_] | None = None
    select: Literal["best", "last"] = "last"
    read_threads: int = 16
    max_bad_fraction: float = 0.05
