"""Two minutes of everything at once on the service: no error, and memory that does not grow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_minutes_of_mixed_load_with_switches(tmp_path: Path) -> None:
    """Caches and the allocator fill in so short a time: what is bounded here is a leak at every switch."""
    given = ["--images", "300", "--minutes", "2", "--swap-seconds", "3", "--growth", "0.2", "--json"]
    ended = subprocess.run(
        [sys.executable, "benchmarks/serve_load.py", "--work", str(tmp_path), *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode in {0, 1}, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert (found["errors"], found["first_errors"]) == (0, [])
    assert found["growth"] <= 0.2, found["memory_mb"]
    assert found["switches"] >= 10
    missing = {"words", "picture", "export", "thumbnail", "refused", "similar"} - found["kinds"].keys()
    assert not missing
    assert found["answers"] > 500
