"""The losses of an epoch are means over what was learnt from, not over steps."""

from __future__ import annotations

import pytest

from for_ray.model.finetuning import LossMean
from for_ray.stages.loss_curve import LossCurve


def test_steps_count_by_what_they_learnt_from() -> None:
    curve = LossCurve(4)
    for mean, weight in ((2.0, 1.0), (0.0, 0.0), (4.0, 3.0), (0.0, 0.0)):
        curve.add({"sup": LossMean(mean, weight, 1, 2)})
    totals = curve.totals(10)
    assert totals["losses"]["sup"] == pytest.approx((2 * 1 + 4 * 3) / 4)
    assert (totals["num_matched"]["sup"], totals["num_dropped"]["sup"]) == (4, 8)
    assert [(point.step, point.losses["sup"]) for point in totals["curve"]] == [
        (11, 2.0), (12, 0.0), (13, 4.0), (14, 0.0),
    ]  # fmt: skip


def test_long_epochs_are_told_in_twenty_points() -> None:
    curve = LossCurve(100)
    for step in range(100):
        curve.add({"pse": LossMean(float(step), 2.0, 0, 0)})
    points = curve.totals(0)["curve"]
    assert len(points) == 20
    assert points[0].losses["pse"] == pytest.approx(2.0)  # 0, 1, 2, 3, 4
    assert points[-1].step == 100
