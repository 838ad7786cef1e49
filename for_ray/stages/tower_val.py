"""The images that the epochs of a tuning of CLIP's towers are measured on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from for_ray.datasets.labelled import Ragged
from for_ray.stages.training_images import TrainingImages


@dataclass(frozen=True)
class TowerVal:
    """Validation images; travels to the workers.

    Attributes:
        name: What messages call them.
        uris: Where the images lie [B], strings.
        texts: What they are asked for by: the names of the classes, for `realign` the captions.
        of_image: Which of the texts each image has: the one of its class, for `realign` at least one.
    """

    name: str
    uris: pa.Array
    texts: tuple[str, ...]
    of_image: Ragged

    def __len__(self) -> int:
        """B."""
        return len(self.uris)

    @property
    def images(self) -> TrainingImages:
        """As they are read: without labels."""
        return TrainingImages(Ragged.empty(len(self)), np.zeros(len(self), bool), uris=self.uris)

    def digest(self) -> str:
        """A hash of which images these are, and of what they show: 64 hex digits."""
        found = hashlib.sha256(self.of_image.offsets.tobytes() + self.of_image.values.tobytes())
        for words in (self.uris.to_pylist(), self.texts):
            found.update(b"|" + "\n".join(words).encode())
        return found.hexdigest()
