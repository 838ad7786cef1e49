"""Two nightly jobs that are started at the same moment on one index."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lance
import pytest

from for_ray.index import snapshots
from for_ray.schema import Layout

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 120


@pytest.mark.slow
def test_of_two_jobs_started_together_one_writes(
    draw: Callable[..., None], encoder_name: str, tmp_path: Path
) -> None:
    """Who comes second is refused, or, should the first be done by then, finds nothing to do."""
    draw(tmp_path / "images", range(NUM_IMAGES))
    layout = Layout(str(tmp_path / "index"))
    words = ["--images", tmp_path / "images", "--index", layout.index_uri, "--encoder", encoder_name]
    command = [sys.executable, str(ROOT / "jobs" / "index.py"), *map(str, words), "--head", "dense"]
    without_ray = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    jobs = [
        subprocess.Popen(command, env=without_ray, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [job.communicate() for job in jobs]
    codes = sorted(job.returncode for job in jobs)
    assert codes in ([0, 2], [0, 0]), outputs
    for job, (told, error) in zip(jobs, outputs, strict=True):
        if job.returncode == 2:
            assert "is being written by jobs/index.py (run " in error.splitlines()[-1]
            assert "published" not in told
    snapshot = snapshots.latest(layout)
    assert (snapshot.snapshot_id, snapshot.indexed) == (1, NUM_IMAGES)
    uris = lance.dataset(layout.images_uri(snapshot.fingerprint)).to_table(columns=["uri"])["uri"].to_pylist()
    assert len(uris) == len(set(uris)) == NUM_IMAGES
