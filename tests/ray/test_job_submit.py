"""`ray job submit` with a token, as a scheduler does it: ids, exit codes, a stop and what it costs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from for_ray.index import table
from tests.clusters import RAY, Head, ray_head, wait_for

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4
NUM_IMAGES = 1200


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with a dashboard that takes nobody without the token."""
    path = os.pathsep.join([str(RAY.parent), os.environ["PATH"]])  # the job's `python`
    with ray_head(num_cpus=2, dashboard=True, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, PATH=path) as head:
        yield head


@pytest.fixture(scope="module")
def run_job(head: Head) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`ray job …` to the head, with its token or another."""

    def run(*arguments: str, token: str | None = TOKEN, timeout: float = 240) -> Any:
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        environment["RAY_API_SERVER_ADDRESS"] = head.dashboard_url
        if token is not None:
            environment.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
        return subprocess.run(
            [str(RAY), "job", *arguments],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def entrypoint(images: Path, index: Path, encoder: str, *more: str) -> list[str]:
    given = ["python", "jobs/index.py", "--images", str(images), "--index", str(index), "--encoder", encoder]
    return ["--working-dir", ".", "--", *given, "--head", "dense", "--json", *more]


def summary_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"listed"')]
    return json.loads(line)


def test_nobody_submits_without_the_token(run_job):
    for token in (None, TOKEN[::-1]):
        refused = run_job("submit", "--", "echo", "done", token=token)
        assert refused.returncode == 1
        assert "done" not in refused.stdout.splitlines()
        assert "token" in refused.stdout + refused.stderr


def test_a_dated_id_runs_once_and_the_exit_code_tells_how(run_job, draw, encoder_name, tmp_path):
    draw(tmp_path / "images", range(20))
    job = entrypoint(tmp_path / "images", tmp_path / "index", encoder_name)
    first = run_job("submit", "--submission-id", "nightly-2026-11-22", *job)
    assert first.returncode == 0, first.stdout + first.stderr
    assert (summary_of(first)["indexed"], summary_of(first)["snapshot"]) == (20, 1)
    again = run_job("submit", "--submission-id", "nightly-2026-11-22", *job)
    assert again.returncode == 1
    assert "nightly-2026-11-22" in again.stdout + again.stderr
    next_night = run_job("submit", "--submission-id", "nightly-2026-11-23", *job)
    assert next_night.returncode == 0
    assert (summary_of(next_night)["new"], summary_of(next_night)["snapshot"]) == (0, 1)
    refused = run_job("submit", *entrypoint(tmp_path / "none", tmp_path / "index", encoder_name))
    assert refused.returncode == 1
    assert "error: " in refused.stdout
    assert "exit code 2" in refused.stdout + refused.stderr


def test_a_job_that_is_stopped_and_submitted_again_goes_on(run_job, draw, encoder_name, tmp_path):
    draw(tmp_path, range(1))
    large = tmp_path / "large.png"  # takes a while to decode, so that there is a middle to stop in
    Image.open(tmp_path / "00000.jpg").resize((1600, 1200)).save(large)
    (tmp_path / "images").mkdir()
    for number in range(NUM_IMAGES):
        os.link(large, tmp_path / "images" / f"{number}.png")
    index = tmp_path / "index"
    more = ["--commit-seconds", "0.05", "--batch-size", "16", "--max-actors", "1"]
    job = entrypoint(tmp_path / "images", index, encoder_name, *more)
    patient = ["--runtime-env-json", json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})]
    assert run_job("submit", "--no-wait", "--submission-id", "stopped", *patient, *job).returncode == 0

    def num_rows() -> int:
        uris = [str(path) for path in index.glob("encoder-*/images.lance")]
        images = table.open_table(uris[0]) if uris else None
        return images.count_rows() if images is not None else 0

    wait_for(num_rows, seconds=120, what="the first commit")
    assert run_job("stop", "stopped").returncode == 0
    assert "Job 'stopped' was stopped" in run_job("status", "stopped").stdout
    held = num_rows()
    assert 0 < held < NUM_IMAGES, held
    said = run_job("logs", "stopped").stdout.splitlines()
    assert "error: stopped by SIGTERM; run again to go on: what was committed stays" in said
    (report,) = (index / "reports").glob("*.json")
    assert json.loads(report.read_text())["message"] == "stopped by SIGTERM"
    resumed = run_job("submit", "--submission-id", "resumed", *job)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    summary = summary_of(resumed)
    assert (summary["new"], summary["unchanged"]) == (NUM_IMAGES - held, held)
    assert (summary["indexed"], summary["snapshot"]) == (NUM_IMAGES, 1)
