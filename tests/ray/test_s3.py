"""The index job as a command, from a bucket into a bucket, against the same images on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

from for_ray.index import snapshots
from for_ray.schema import Layout
from for_ray.storage import lance_options, upload
from tests.seaweed import environment, seaweed

ROOT = Path(__file__).parents[2]


def run_job(*words: object) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "jobs" / "index.py"), *map(str, words), "--json"]
    without_ray = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, env=without_ray)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # a raylet may have warned before


def rows_of(index_uri: str) -> dict[str, dict[str, Any]]:
    layout = Layout(index_uri)
    snapshot = snapshots.latest(layout)
    uri = layout.images_uri(snapshot.fingerprint)
    images = lance.dataset(uri, version=snapshot.images_version, storage_options=lance_options(uri))
    return {row["uri"].rsplit("/", 1)[-1]: row for row in images.to_table().to_pylist()}


@pytest.mark.s3
def test_a_bucket_gives_what_a_folder_gives(
    draw: Callable[..., None], encoder_name: str, tmp_path: Path
) -> None:
    names = ["a b.jpg", "50%.jpg", "x#1.jpg", "ü?.jpg"]
    draw(tmp_path / "images", range(24))
    for number, name in enumerate(names):
        (tmp_path / "images" / f"{number:05d}.jpg").rename(tmp_path / "images" / name)
    given = ["--encoder", encoder_name, "--head", "dense", "--batch-size", 8]
    with seaweed() as server, environment(server):
        bucket = f"s3://{server.make_bucket()}"
        for path in (tmp_path / "images").iterdir():
            upload(path, f"{bucket}/images/{path.name}")
        there = run_job("--images", f"{bucket}/images", "--index", f"{bucket}/index", *given)
        again = run_job("--images", f"{bucket}/images", "--index", f"{bucket}/index", *given)
        here = run_job("--images", tmp_path / "images", "--index", tmp_path / "index", *given)
        s3, disk = rows_of(f"{bucket}/index"), rows_of(str(tmp_path / "index"))
    assert (there["new"], there["indexed"], there["snapshot"]) == (24, 24, 1)
    assert (again["new"], again["unchanged"], again["snapshot"]) == (0, 24, 1)
    assert there["vectors"] == here["vectors"]
    assert set(names) < set(s3) == set(disk)
    for name, row in disk.items():
        assert row["boxes"] == s3[name]["boxes"]
        np.testing.assert_allclose(
            np.array(row["vectors"], np.float32), np.array(s3[name]["vectors"], np.float32), atol=2e-3
        )
