"""Nodes that come when the index job asks for them and go when it is done, by Ray's own autoscaler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.clusters import autoscaling_head, wait_for

JOB = Path(__file__).parents[2] / "jobs" / "index.py"
CPU = {"CPU": 2, "memory": 2 << 30, "object_store_memory": 100 << 20}
GPU = {"CPU": 1, "GPU": 1, "memory": 2 << 30, "object_store_memory": 100 << 20}
NUM_IMAGES = 200


@pytest.mark.slow
def test_gpu_and_cpu_nodes_come_from_none_and_go_and_a_night_without_work_starts_none(
    draw, encoder_name, tmp_path
):
    draw(tmp_path / "images", range(NUM_IMAGES))
    command = [sys.executable, str(JOB), "--images", str(tmp_path / "images"), "--head", "dense", "--json"]
    command += ["--index", str(tmp_path / "index"), "--encoder", encoder_name, "--batch-size", "8"]
    command += ["--device", "cuda", "--max-actors", "2"]
    types = {
        "cpu": {"resources": CPU, "labels": {}, "max_workers": 2},
        "gpu": {"resources": GPU, "labels": {"market": "spot"}, "max_workers": 2},
    }
    with autoscaling_head(types, num_cpus=0, idle_seconds=5) as head:
        environment = {**os.environ, **head.environment, "RAY_ADDRESS": head.address}
        is_over, seen = threading.Event(), [(head.num_with("GPU"), head.num_with("CPU"))]

        def watch() -> None:
            while not is_over.wait(0.2):
                seen.append((head.num_with("GPU"), head.num_with("CPU")))

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
            assert done.returncode == 0, done.stderr
            wait_for(lambda: len(head.nodes()) == 1, seconds=60, what="the workers to go")
            in_the_end = len(seen)
            again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        finally:
            is_over.set()
            watching.join()
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["indexed"], summary["snapshot"], summary["recall_at_50"]) == (NUM_IMAGES, 1, 1.0)
    assert seen[0] == (0, 0)
    assert max(gpus for gpus, _ in seen) == 2
    assert max(cpus - gpus for gpus, cpus in seen) >= 1  # GPU nodes have a CPU too
    assert json.loads(again.stdout.splitlines()[-1])["unchanged"] == NUM_IMAGES
    assert set(seen[in_the_end:]) <= {(0, 0)}
