"""The job that labels images as a command, from a bucket into a bucket, against the same images on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

from for_ray.datasets.picturebook import write_picturebook
from for_ray.storage import lance_options, read_bytes, upload
from tests.seaweed import environment, seaweed

ROOT = Path(__file__).parents[2]


def run_job(*words: object) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "jobs" / "pseudo_label.py"), *map(str, words), "--json"]
    without_ray = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, env=without_ray)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # a raylet may have warned before


def rows_of(output: str) -> dict[str, dict[str, Any]]:
    uri = f"{output}/labels.lance"
    rows = lance.dataset(uri, storage_options=lance_options(uri)).to_table().to_pylist()
    return {row["uri"].rsplit("/", 1)[-1]: row for row in rows}


@pytest.mark.slow
@pytest.mark.s3
def test_a_bucket_gives_what_a_folder_gives(tmp_path: Path) -> None:
    book = tmp_path / "book"
    write_picturebook(book, images=16, split="train", processes=1)
    names = tmp_path / "names.txt"
    names.write_text("dog\ncat\nbicycle\numbrella\nkey\nclock\n")
    given = ["--threshold", 0.3, "--batch-size", 8]
    with seaweed() as server, environment(server):
        bucket = f"s3://{server.make_bucket()}"
        for path in [*(each for each in book.rglob("*") if each.is_file()), names]:
            upload(path, f"{bucket}/{path.relative_to(tmp_path)}")
        there = ["--dataset", f"picturebook:{bucket}/book", "--vocabulary", f"{bucket}/names.txt"]
        first = run_job(*there, "--output", f"{bucket}/labels", *given)
        again = run_job(*there, "--output", f"{bucket}/labels", *given)
        here = run_job(
            *("--dataset", f"picturebook:{book}", "--vocabulary", names),
            *("--output", tmp_path / "labels", *given),
        )
        s3, disk = rows_of(f"{bucket}/labels"), rows_of(str(tmp_path / "labels"))
        assert b"data:image/jpeg" in read_bytes(f"{bucket}/labels/report.html")
    assert (first["new"], first["labelled"]) == (16, 16)
    assert (again["new"], again["unchanged"]) == (0, 16)
    assert {name: first[name] for name in ("labels", "precision", "recall")} == {
        name: here[name] for name in ("labels", "precision", "recall")
    }
    assert set(s3) == set(disk)
    for name, row in disk.items():
        assert row["labels"] == s3[name]["labels"]
        np.testing.assert_allclose(row["features"], s3[name]["features"], atol=2e-3)
