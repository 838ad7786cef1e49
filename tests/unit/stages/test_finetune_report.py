"""What a fine-tuning tells of its epochs."""

from __future__ import annotations

from for_ray.schema import EpochMetrics
from for_ray.stages.finetune_report import epoch_line


def line_of(**more: object) -> str:
    given = {
        "epoch": 2, "lr": 0.1, "losses": {"classes": 1.5}, "curve": (), "num_matched": {}, "num_dropped": {},
        "num_unreadable": 0, "seconds": 4.0,
    }  # fmt: skip
    return epoch_line(EpochMetrics(**(given | more)), 3)


def test_an_epoch_tells_what_was_measured_and_how_long_it_took():
    assert line_of() == "epoch 2 of 3: classes 1.500; 4.0 s"
    measured = {"measures": {"R@1": 0.5}, "num_val_unreadable": 2, "seconds_measuring": 1.25}
    assert line_of(**measured, measures_before={"R@1": 0.25}) == (
        "epoch 2 of 3: classes 1.500, val R@1 0.500 (0.250 before), 2 images of --val cannot be read, or "
        "have no finite vector; 4.0 s and 1.2 s to measure"
    )


def test_an_epoch_that_was_not_measured_tells_why():
    problem = "--val: 5 of 6 images of a cannot be read"
    found = line_of(val_problem=problem, num_val_unreadable=5)
    assert found == f"epoch 2 of 3: classes 1.500, not measured: {problem}; 4.0 s"
