"""An index that is encoded, trained and built on the GPU answers as one of the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from for_ray.index import snapshots, table
from for_ray.schema import Layout

JOB = Path(__file__).parents[2] / "jobs" / "index.py"


def build(images: Path, index: Path, device: str) -> dict[str, Any]:
    """The job's JSON; it starts a Ray of its own, which finds the GPUs by itself."""
    command = [sys.executable, str(JOB), "--images", str(images), "--index", str(index), "--device", device]
    command += ["--codec", "HR,IVF4,RaBitQ4", "--json"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    summary: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return summary


def vectors_of(index: Path) -> dict[str, np.ndarray]:
    """The stored vectors [n, D] of each image, by the file's name."""
    layout = Layout(str(index))
    snapshot = next(snapshots.list_snapshots(layout))
    rows = (
        table.require_table(layout.images_uri(snapshot.fingerprint)).to_table(["uri", "vectors"]).to_pylist()
    )
    return {Path(row["uri"]).name: np.asarray(row["vectors"], np.float32) for row in rows}


@pytest.mark.slow
@pytest.mark.ray
def test_an_index_of_the_device_is_that_of_the_cpu(device, book, tmp_path):
    here, there = build(book, tmp_path / "here", device), build(book, tmp_path / "there", "cpu")
    for name in ("listed", "indexed", "quarantined"):
        assert here[name] == there[name], name
    assert here["indexed"] == 16
    assert here["vectors"] == pytest.approx(there["vectors"], rel=0.05)
    assert here["recall_at_50"] == pytest.approx(there["recall_at_50"], abs=0.01)
    found, right = vectors_of(tmp_path / "here"), vectors_of(tmp_path / "there")
    assert found.keys() == right.keys()
    matches = np.concatenate([(found[name] @ right[name].T).max(axis=1) for name in found])
    assert np.median(matches) > 0.99
    assert (matches > 0.99).mean() > 0.95
