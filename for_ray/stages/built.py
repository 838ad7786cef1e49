"""What building and merging hand on: what a snapshot can be published of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray

from for_ray.index.drafts import Draft, DraftRecord
from for_ray.schema import Codec, Segment
from for_ray.stages.ranges import RangeJob


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
        base_id: The snapshot that the build went on from; None where there was none.
    """

    codec: Codec | None
    segments: list[Segment]
    deleted: NDArray[np.int64]
    num_vectors: int
    nprobe: int
    is_new: bool
    vectors_per_segment: int
    retrained: str | None = None
    base_id: int | None = None


def draft_of(job: RangeJob, built: Built, *, first_new: int) -> Draft:
    """What the next run goes on from if this one ends here; see `DraftRecord.first_new`."""
    record = DraftRecord(
        base_id=built.base_id,
        images_version=job.version,
        codec=built.codec,
        segments=built.segments,
        first_new=first_new,
        is_new=built.is_new,
        retrained=built.retrained,
    )
    return Draft(record, built.deleted)


def collect(
    running: Sequence[Any], *, on_done: Callable[[int, Any], None], on_progress: Callable[[int], None]
) -> None:
    """Wait for all tasks, and take their results as they come; what one raises is raised when all have ended.

    Args:
        running: Ray's references.
        on_done: Called with a task's place in `running` and its result.
        on_progress: Called with the number of tasks that have ended.
    """
    places = {reference: place for place, reference in enumerate(running)}
    failure: ray.exceptions.RayError | None = None
    waiting = list(running)
    while waiting:
        ended, waiting = ray.wait(waiting, timeout=10)
        for reference in ended:
            try:
                result = ray.get(reference)
            except ray.exceptions.RayError as error:
                failure = failure or error
            else:
                on_done(places[reference], result)
        on_progress(len(running) - len(waiting))
    if failure is not None:
        raise failure
