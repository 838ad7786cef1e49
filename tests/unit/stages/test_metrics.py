"""Seconds of workers: what the clock calls waiting, and that a block's seconds survive being cut up."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from for_ray.stages.metrics import Clock, _spread


class Time:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_calls_that_overlap_work_once_and_wait_never():
    time = Time()
    clock = Clock(time)
    time.seconds += 5  # nobody asks
    clock.start()
    time.seconds += 2  # the first alone
    clock.start()
    time.seconds += 3  # both
    assert clock.stop() == (5, 5)
    time.seconds += 1  # the second alone
    assert clock.stop() == (0, 1)
    time.seconds += 7
    clock.start()
    time.seconds += 4
    assert clock.stop() == (7, 4)


def test_each_row_carries_its_share():
    block = _spread(pa.table({"uri": list("abcd")}), "read_seconds", 2.0)
    assert block["read_seconds"].to_pylist() == [0.5] * 4
    parts = [block.slice(0, 1), block.slice(1)]
    assert [pc.sum(part["read_seconds"]).as_py() for part in parts] == [0.5, 1.5]
    assert _spread(block.slice(0, 0), "wait_seconds", 1.0).num_rows == 0


@pytest.mark.parametrize("amounts", [(), (0.0,), (1.0, 2.5)])
def test_the_clock_starts_anew_for_each_call(amounts):
    time = Time()
    clock = Clock(time)
    found = []
    for seconds in amounts:
        clock.start()
        time.seconds += seconds
        found.append(clock.stop())
    assert found == [(0.0, seconds) for seconds in amounts]
