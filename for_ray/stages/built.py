"""What building and merging hand on: what a snapshot can be published of."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from for_ray.schema import Codec, Segment


class Built(NamedTuple):
    """What a snapshot can be published of.

    Attributes:
        codec: None where there never were vectors.
        segments: By image id.
        deleted: Ids of images that segments hold and the table does not; ascending.
        num_vectors: Of the images that the table holds.
        nprobe: Where to begin measuring.
        is_new: Whether segments were built: recall has to be measured. Merging leaves it as it is.
        vectors_per_segment: The most that a merged segment may have.
        retrained: Why the codec was trained anew; None where it was not, or is the first one.
    """

    codec: Codec | None
    segments: list[Segment]
    deleted: NDArray[np.int64]
    num_vectors: int
    nprobe: int
    is_new: bool
    vectors_per_segment: int
    retrained: str | None = None
