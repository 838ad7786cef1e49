"""What the workers of a stage measure: seconds that go to the driver with the rows, and Prometheus metrics.

Ray exports the metrics of every process at its node's metrics port, with the prefix `ray_`; each has the tag
`job`. A counter counts what was done, also what was done twice because a worker died; sum it over workers.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from for_ray.stages.blocks import EncodeCounts, ImageJob, TableJob, write_block

SECONDS = ("read_seconds", "wait_seconds", "encode_seconds")
"""Columns of a block on its way: each row's share of what was spent on it so far."""

COUNTERS = {
    "images_read_total": "Images fetched and decoded.",
    "images_encoded_total": "Images encoded.",
    "images_quarantined_total": "Images stored as quarantined.",
    "images_skipped_total": "Images that were gone, replaced or denied when they were to be read.",
    "read_seconds_total": "Seconds that tasks fetched and decoded.",
    "encode_seconds_total": "Seconds that actors encoded.",
    "encoder_wait_seconds_total": "Seconds that actors, and their GPUs, waited for images.",
    "write_seconds_total": "Seconds that tasks wrote files of the table.",
}

GAUGES = {
    "queue_images": "Images that the run has still to encode.",
    "committed_images": "Images that the run has committed.",
}


def count(name: str, amount: float, *, job: str) -> None:
    """Add to one of `COUNTERS`; nothing is added where there is nothing to add."""
    if amount > 0:
        _counter(name).inc(float(amount), tags={"job": job})


def show(name: str, value: float, *, job: str) -> None:
    """Set one of `GAUGES`."""
    _gauge(name).set(float(value), tags={"job": job})


@functools.cache
def _counter(name: str) -> Any:
    from ray.util.metrics import Counter

    return Counter(f"for_ray_{name}", description=COUNTERS[name], tag_keys=("job",))


@functools.cache
def _gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(f"for_ray_{name}", description=GAUGES[name], tag_keys=("job",))


def measured_read(block: pa.Table, *, job: ImageJob, read: Callable[..., pa.Table]) -> pa.Table:
    """What `read` makes of a block of the gap, with `read_seconds`."""
    started = time.monotonic()
    block = read(block, job=job)
    seconds = time.monotonic() - started
    count("images_read_total", block.num_rows - block["width"].null_count, job=job.tag)
    count("read_seconds_total", seconds, job=job.tag)
    return _spread(block, "read_seconds", seconds)


class MeasuredActor:
    """An actor of a stage, and a clock beside it.

    Args:
        actor: The actor's class, made of the other two.
        job: The job.
        num_threads: Threads of the model where it runs on the CPU.
    """

    def __init__(self, actor: type[Any], job: ImageJob, num_threads: int) -> None:
        self._actor, self._job = actor(job, num_threads), job
        self._clock = Clock()

    def __call__(self, block: pa.Table) -> pa.Table:
        """What the actor makes of a block, with `wait_seconds` and `encode_seconds`."""
        num_images = block.num_rows - block["width"].null_count
        self._clock.start()
        try:
            block = self._actor(block)
        finally:
            waited, worked = self._clock.stop()
        count("images_encoded_total", num_images, job=self._job.tag)
        count("encoder_wait_seconds_total", waited, job=self._job.tag)
        count("encode_seconds_total", worked, job=self._job.tag)
        return _spread(_spread(block, "wait_seconds", waited), "encode_seconds", worked)


class Clock:
    """Tells waiting from working where calls overlap: whoever is alone waits, several work once.

    Args:
        now: The time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._num_calls = 0
        self._since = now()
        self._waited = self._worked = 0.0

    def start(self) -> None:
        """A call begins."""
        with self._lock:
            self._advance()
            self._num_calls += 1

    def stop(self) -> tuple[float, float]:
        """A call ends; the seconds waited and worked since a call ended last."""
        with self._lock:
            self._advance()
            self._num_calls -= 1
            passed = self._waited, self._worked
            self._waited = self._worked = 0.0
        return passed

    def _advance(self) -> None:
        now = self._now()
        if self._num_calls:
            self._worked += now - self._since
        else:
            self._waited += now - self._since
        self._since = now


def measured_write(block: pa.Table, *, job: TableJob) -> pa.Table:
    """What `write_block` gives, with the sums of `SECONDS` and `write_seconds`."""
    started = time.monotonic()
    sums = {name: pc.sum(block[name]).as_py() or 0.0 for name in SECONDS}
    written = write_block(block, job=job)
    sums["write_seconds"] = time.monotonic() - started
    counts = EncodeCounts.of(written)
    count("images_quarantined_total", counts.quarantined, job=job.tag)
    count("images_skipped_total", counts.skipped, job=job.tag)
    count("write_seconds_total", sums["write_seconds"], job=job.tag)
    for name, seconds in sums.items():
        written = written.append_column(name, pa.array([seconds]))
    return written


def _spread(block: pa.Table, name: str, seconds: float) -> pa.Table:
    shares = np.full(block.num_rows, seconds / max(block.num_rows, 1))
    return block.append_column(name, pa.array(shares))
