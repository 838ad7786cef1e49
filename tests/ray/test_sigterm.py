"""SIGTERM to a run, as `ray job stop` sends it: one line, a report, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clusters import wait_for
from tests.index_runs import IndexRun, index_run

pytestmark = pytest.mark.slow

NUM_IMAGES = 2000
ENDED = ("failed", "stopped by SIGTERM")
LINE = "error: stopped by SIGTERM; run again to go on: what was committed stays"


@pytest.fixture
def run(
    ray_address: str, encoder_name: str, draw: Callable[..., None], tmp_path: Path
) -> Callable[..., object]:
    """Makes runs that commit their images a few at a time, each with a `$TMPDIR` of the test's."""
    draw(tmp_path / "images", range(40))
    for number in range(40, NUM_IMAGES):
        os.link(tmp_path / "images" / f"{number % 40:05d}.jpg", tmp_path / "images" / f"{number:05d}.jpg")
    (tmp_path / "scratch").mkdir()

    def start(address: str = ray_address) -> object:
        settings = ["--images", tmp_path / "images", "--encoder", encoder_name, "--head", "dense"]
        pace = ["--commit-seconds", "0.05", "--batch-size", "8", "--max-actors", "1"]
        # Ray's own folder is of a short name: it becomes part of sockets' names.
        env = {"TMPDIR": str(tmp_path / "scratch"), "RAY_TMPDIR": tempfile.gettempdir()}
        return index_run(str(tmp_path / "index"), address, *settings, *pace, env=env)

    return start


def check_end(run: IndexRun, tmp_path: Path, *, has_report: bool = True) -> None:
    assert run.end(seconds=60) == 143, run.output
    lines = run.output.splitlines()
    assert lines[-1] == LINE
    assert not [line for line in lines if "***" in line or "Traceback" in line]
    reports = [json.loads(path.read_text()) for path in (tmp_path / "index" / "reports").glob("*.json")]
    assert [(each["outcome"], each["message"]) for each in reports] == [ENDED] * has_report
    assert list((tmp_path / "scratch").glob("*for-ray-*")) == []


def test_a_run_that_is_stopped_while_it_encodes(run: Callable[..., IndexRun], tmp_path: Path) -> None:
    with run() as stopped:
        assert 0 < len(stopped.wait_for_rows(8)) < NUM_IMAGES, stopped.output
        stopped.process.send_signal(signal.SIGTERM)
        stopped.process.send_signal(signal.SIGTERM)
        check_end(stopped, tmp_path)
    with run() as again:
        assert again.end() == 0, again.output


def test_a_run_that_is_stopped_while_it_starts_ray(run: Callable[..., IndexRun], tmp_path: Path) -> None:
    """Inside `ray.init`, where Ray has handlers of its own."""
    with run("local") as stopped:
        pid = stopped.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        wait_for(lambda: children.read_text(), seconds=60, what="Ray", is_lost=lambda: not stopped.is_running)
        started = children.read_text().split()
        stopped.process.send_signal(signal.SIGTERM)
        check_end(stopped, tmp_path, has_report=False)  # no lease was taken, and no index is there
    wait_for(lambda: not any(Path("/proc", each).exists() for each in started), seconds=60, what="Ray's end")


def test_a_run_on_a_cluster_of_its_own_that_is_stopped_while_it_encodes(
    run: Callable[..., IndexRun], tmp_path: Path
) -> None:
    with run("local") as stopped:
        assert 0 < len(stopped.wait_for_rows(8)) < NUM_IMAGES, stopped.output
        stopped.process.send_signal(signal.SIGTERM)
        check_end(stopped, tmp_path)
