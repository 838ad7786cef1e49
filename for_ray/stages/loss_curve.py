"""The losses of an epoch: step by step, in points of a curve, and as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from for_ray.model.finetuning import LossMean
from for_ray.schema import LossPoint

POINTS_OF_AN_EPOCH = 20
"""Of a curve, at most."""


class LossCurve:
    """Adds up the losses of an epoch's steps.

    Args:
        num_steps: Of the epoch.
    """

    def __init__(self, num_steps: int) -> None:
        self._length = max(1, -(-num_steps // POINTS_OF_AN_EPOCH))
        self._steps: list[Mapping[Any, LossMean]] = []

    def add(self, means: Mapping[Any, LossMean]) -> None:
        """One step more."""
        self._steps.append(means)

    def totals(self, first_step: int) -> dict[str, Any]:
        """The fields of `EpochMetrics` that steps decide."""
        names = list(self._steps[0])
        ends = range(self._length, len(self._steps) + self._length, self._length)
        parts = [self._steps[end - self._length : end] for end in ends]
        points = []
        for part, end in zip(parts, ends, strict=True):
            losses = {str(name): _mean([step[name] for step in part]) for name in names}
            points.append(LossPoint(step=first_step + min(end, len(self._steps)), losses=losses))
        return {
            "losses": {name: _mean([step[name] for step in self._steps]) for name in names},
            "num_matched": {name: sum(step[name].num_matched for step in self._steps) for name in names},
            "num_dropped": {name: sum(step[name].num_dropped for step in self._steps) for name in names},
            "curve": tuple(points),
        }


def _mean(steps: Sequence[LossMean]) -> float:
    """Over all that was learnt from: a step without labels counts nothing."""
    weight = sum(step.weight for step in steps)
    return sum(step.mean * step.weight for step in steps) / weight if weight else 0.0
