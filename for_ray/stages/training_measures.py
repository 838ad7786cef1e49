"""What each epoch of a fine-tuning is measured by: mAP@50 on validation images, and on held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from for_ray.datasets.labelled import Ragged
from for_ray.evaluation.ranking import average_precisions_at_k
from for_ray.evaluation.summary import DEPTH, GroupMeans
from for_ray.model.objectives import LossName
from for_ray.stages.training_images import TrainingImages
from for_ray.stages.training_job import FinetuneJob

if TYPE_CHECKING:
    from torch import Tensor


MOST_NAMES = 1000
"""Names of pseudo-labels that held-out images are measured by, the most frequent: [V, B] scores are held."""


class Measures:
    """Measures the weights as they are.

    Args:
        job: The fine-tuning.
        texts: Unit vectors of each loss's categories [V, D].
        val_text: Those of the validation's; None without.
        score: Gives each category's score of each image [V, B].
    """

    def __init__(
        self,
        job: FinetuneJob,
        texts: Mapping[LossName, Tensor],
        val_text: Tensor | None,
        score: Callable[[TrainingImages, Tensor], NDArray[np.float32]],
    ) -> None:
        self._job, self._texts, self._val_text, self._score = job, texts, val_text, score

    def val(self) -> dict[str, float | None] | None:
        """Of `base`, `novel` and `all` categories; None without validation images."""
        job = self._job
        if job.val is None or self._val_text is None or job.val_is_novel is None:
            return None
        precisions = self._precisions(job.val, job.val.labels, self._val_text)
        return GroupMeans.of(precisions, job.val_is_novel).model_dump()

    def held_out(self) -> dict[str, float | None]:
        """By labels and by pseudo-labels, as far as these are trained on: fields of `EpochMetrics`."""
        job = self._job
        measured: dict[str, float | None] = {}
        if job.held_out is None:
            return {}
        labelled = np.flatnonzero(job.held_out.is_labelled)
        if "sup" in self._texts and len(labelled):
            images = job.held_out.select(labelled)
            measured["held_out_base"] = _mean(self._precisions(images, images.labels, self._texts["sup"]))
        if "pse" in self._texts and job.held_out_pseudo is not None:
            names, pseudo = most_frequent(job.held_out_pseudo, MOST_NAMES)
            text = self._texts["pse"][names.tolist()]
            measured["held_out_pseudo"] = _mean(self._precisions(job.held_out, pseudo, text))
        return measured

    def _precisions(self, images: TrainingImages, labels: Ragged, text: Tensor) -> NDArray[np.float64]:
        """AP@50 of each category [V], the same on all workers."""
        relevant = np.zeros((len(text), len(images)), bool)
        relevant[labels.values, np.repeat(np.arange(len(images)), np.diff(labels.offsets))] = True
        return average_precisions_at_k(self._score(images, text), relevant, DEPTH)


def most_frequent(lists: Ragged, most: int) -> tuple[NDArray[np.int64], Ragged]:
    """The values that come most often, ascending, and the lists of their places among these.

    Args:
        lists: Of values.
        most: How many are kept; the others are left out of the lists.
    """
    values, counts = np.unique(lists.values, return_counts=True)
    kept = np.sort(values[np.lexsort((values, -counts))[:most]])
    is_kept = np.isin(lists.values, kept)
    offsets = np.concatenate([[0], np.cumsum(is_kept)])[lists.offsets]
    places = np.searchsorted(kept, lists.values[is_kept])
    return kept.astype(np.int64), Ragged(offsets.astype(np.int64), places.astype(np.int32))


def _mean(precisions: NDArray[np.float64]) -> float | None:
    found = precisions[~np.isnan(precisions)]
    return float(found.mean()) if len(found) else None
