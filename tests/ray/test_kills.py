"""What is killed in the middle of a run costs time, and nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from for_ray.config import IndexSettings
from for_ray.index import snapshots
from for_ray.pipeline.index import run_index
from for_ray.schema import Layout, RunReport
from for_ray.stages.progress import Progress
from for_ray.stages.report import IndexSummary
from for_ray.storage import upload
from tests.index_runs import (
    JOB,
    committed_rows,
    differences,
    encoded_again,
    index_run,
    published_rows,
)
from tests.nodes import ACTOR, AT_WORK, READER, RayNodes, ray_nodes
from tests.seaweed import S3Server, environment, seaweed

ROOT = Path(__file__).parents[2]
BAD = {"empty.png": b"", "page.jpg": b"<html>not found</html>"}
NUM_IMAGES = 1200
EQUAL = dict.fromkeys(("lost", "unknown", "duplicated", "errors", "vectors", "boxes", "answers"), 0)
OUTAGE_SECONDS = 20


def arguments(images: object, encoder: str) -> list[object]:
    given = ["--images", images, "--encoder", encoder, "--head", "dense", "--keep-threshold", 1]
    return [*given, "--batch-size", 16, "--max-bad-fraction", 0.1, "--commit-seconds", 0.05]


def run_here(images: Path, index: Path, encoder: str) -> IndexSummary:
    """The job in this process, on the Ray of all tests."""
    words = map(str, arguments(images, encoder))
    given = {name.removeprefix("--").replace("-", "_"): next(words) for name in words}
    return run_index(IndexSettings(**given, index=str(index)), progress=Progress(is_quiet=True))


def write_bad(folder: Path) -> None:
    for name, content in BAD.items():
        (folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def images(draw: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    draw(folder, range(NUM_IMAGES))
    write_bad(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(
    ray_address: str, images: Path, encoder_name: str, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The index that a run makes which nobody kills."""
    index = tmp_path_factory.mktemp("undisturbed") / "index"
    run_here(images, index, encoder_name)
    return str(index)


def test_an_actor_and_then_a_node_die(images, undisturbed, encoder_name, tmp_path):
    with (
        ray_nodes(2) as nodes,
        index_run(str(tmp_path / "index"), nodes.address, *arguments(images, encoder_name)) as run,
    ):
        assert run.wait_for_rows(1)
        assert nodes.kill(ACTOR)
        committed = committed_rows(run.index_uri)
        assert nodes.remove_node()
        nodes.add_node()
        assert run.end() == 0, run.output
    assert 0 < len(committed) < NUM_IMAGES  # both hit in the middle
    assert differences(run.index_uri, undisturbed) == EQUAL
    assert encoded_again(committed, run.index_uri) == []


@pytest.mark.slow
def test_reading_tasks_die_and_a_node_goes_for_good(images, undisturbed, encoder_name, tmp_path):
    with (
        ray_nodes(2) as nodes,
        index_run(str(tmp_path / "index"), nodes.address, *arguments(images, encoder_name)) as run,
    ):
        for _ in range(2):
            wait_for(lambda: nodes.kill(READER) or not run.is_running)
        committed = run.wait_for_rows(1)
        assert nodes.remove_node()
        assert nodes.num_nodes() == 1
        assert run.end() == 0, run.output
    assert 0 < len(committed) < NUM_IMAGES
    assert differences(run.index_uri, undisturbed) == EQUAL
    assert encoded_again(committed, run.index_uri) == []


@pytest.mark.slow
def test_all_gpus_go_and_one_comes_back(images, undisturbed, encoder_name, tmp_path):
    """The driver dies as well: spot nodes and a head that is started anew."""
    index = str(tmp_path / "index")
    with ray_nodes(2) as nodes:
        with index_run(index, nodes.address, *arguments(images, encoder_name)) as run:
            committed = run.wait_for_rows(1)
            nodes.remove_node()
            nodes.remove_node()
            run.kill()
        nodes.add_node()
        with index_run(index, nodes.address, *arguments(images, encoder_name)) as run:
            assert run.end() == 0, run.output
    assert 0 < len(committed) < NUM_IMAGES
    assert differences(index, undisturbed) == EQUAL
    assert encoded_again(committed, index) == []


def wait_for(happened: Callable[[], Any], *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


# The S3 server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with seaweed() as one, environment(one):
        yield one


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.parametrize("outage", ["paused", "killed"])
def test_the_store_is_away_for_a_while(images, encoder_name, server, tmp_path, outage):
    """The run goes on afterwards; where its patience ends before, the next run does."""
    bucket = f"s3://{server.make_bucket()}"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: upload(path, f"{bucket}/images/{path.name}"), images.iterdir()))
    given = arguments(f"{bucket}/images", encoder_name)
    with ray_nodes(1) as nodes:
        with index_run(f"{bucket}/undisturbed", nodes.address, *given) as run:
            assert run.end() == 0, run.output
        for number in range(3):  # a busy machine may see the first commit when all is done
            index = f"{bucket}/index-{number}"
            with index_run(index, nodes.address, *given) as run:
                committed = run.wait_for_rows(1)
                server.pause() if outage == "paused" else server.kill()
                time.sleep(OUTAGE_SECONDS)
                server.resume() if outage == "paused" else server.start()
                ended = run.end()
            if len(committed) < NUM_IMAGES:
                break
        assert ended in (0, 1), run.output
        if ended:
            assert "error: " in run.output.splitlines()[-1]
            with index_run(index, nodes.address, *given) as run:
                assert run.end() == 0, run.output
    cache = tmp_path / "segments"
    assert 0 < len(committed) < NUM_IMAGES
    assert differences(index, f"{bucket}/undisturbed", cache_path=cache) == EQUAL
    assert encoded_again(committed, index) == []


# The driver, between two steps

BOUNDARIES = {
    "committed, and nothing deleted yet": ("for_ray.index.table", "delete_images"),
    "deleted, and nothing built yet": ("for_ray.stages.build", "update_segments"),
    "built, and not published yet": ("for_ray.index.snapshots", "publish"),
    "published, and nothing swept yet": ("for_ray.pipeline.index_write", "sweep"),
}
DYING = """
import importlib, os, runpy, sys
module = importlib.import_module(sys.argv[1])
setattr(module, sys.argv[2], lambda *_, **__: os._exit(137))
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def nights(
    ray_address: str,
    draw: Callable[..., None],
    encoder_name: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, Path]:
    """Images after a change; the index from before it; and one that an undisturbed run makes of it."""
    home = tmp_path_factory.mktemp("nights")
    draw(home / "images", range(40))
    write_bad(home / "images")
    run_here(home / "images", home / "before", encoder_name)
    draw(home / "images", range(3, 5), seed=1)
    draw(home / "images", range(100, 108))
    (home / "images" / "00009.jpg").unlink()
    (home / "images" / "empty.png").unlink()
    run_here(home / "images", home / "undisturbed", encoder_name)
    return home / "images", home / "before", home / "undisturbed"


@pytest.mark.parametrize(
    "boundary",
    [pytest.param(name, marks=[pytest.mark.slow] * (number > 0)) for number, name in enumerate(BOUNDARIES)],
)
def test_the_driver_dies_between_two_steps(nights, ray_address, encoder_name, tmp_path, boundary):
    images, before, undisturbed = nights
    index = shutil.copytree(before, tmp_path / "index")
    words = [*BOUNDARIES[boundary], JOB, "--index", index, *arguments(images, encoder_name)]
    died = subprocess.run(
        [sys.executable, "-c", DYING, *map(str, words)],
        env={**os.environ, "RAY_ADDRESS": ray_address, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert died.returncode == 137, died.stderr
    has_published = boundary.startswith("published")
    assert snapshots.latest(Layout(str(index))).snapshot_id == (2 if has_published else 1)
    committed = {uri: row for uri, row in committed_rows(str(index)).items() if Path(uri).exists()}
    assert {f"{images}/{number:05d}.jpg" for number in range(100, 108)} <= committed.keys()
    after = run_here(images, index, encoder_name)
    assert (after.new, after.snapshot) == (0, 2)
    assert differences(str(index), str(undisturbed)) == EQUAL
    assert encoded_again(committed, str(index)) == []


# An image that kills whatever decodes it

KILLER = b"KILLME!!"
SITE = """
import contextlib
import os
import signal

from PIL import Image

open_image = Image.open


def open_or_die(file, *arguments, **more):
    is_killer = file.read(8) == b"KILLME!!"
    file.seek(0)
    if is_killer:
        os.kill(os.getpid(), signal.SIGKILL)
    return open_image(file, *arguments, **more)


Image.open = open_or_die
"""


@pytest.fixture
def poisoned_nodes(tmp_path: Path) -> Iterator[RayNodes]:
    """A node on whose workers `KILLER` is a file that kills the process which opens it."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    with ray_nodes(1, env={"PYTHONPATH": str(tmp_path / "site")}) as nodes:
        yield nodes


@pytest.mark.slow
def test_an_image_that_kills_its_process_is_quarantined(draw, poisoned_nodes, encoder_name, tmp_path):
    draw(tmp_path / "images", range(300))
    write_bad(tmp_path / "images")
    killers = ["00011.jpg", "00250.jpg"]
    for name in killers:
        (tmp_path / "images" / name).write_bytes(KILLER + bytes(500))
    given = arguments(tmp_path / "images", encoder_name)
    with index_run(str(tmp_path / "index"), poisoned_nodes.address, *given) as run:
        committed = run.wait_for_rows(1)
        assert run.end() == 0, run.output
    errors = {Path(row["uri"]).name: row["error"] for row in published_rows(run.index_uri)}
    assert len(errors) == 302
    assert {name for name, error in errors.items() if error} == {*killers, *BAD}
    for name in killers:
        assert errors[name] == "decoding killed its process (signal 9, SIGKILL)"
    assert encoded_again(committed, run.index_uri) == []
    with index_run(run.index_uri, poisoned_nodes.address, *given) as again:
        assert again.end() == 0, again.output
    assert "nothing changed" in again.output


@pytest.mark.slow
def test_an_encoder_that_dies_again_and_again_ends_the_run_with_advice(images, encoder_name, tmp_path):
    with (
        ray_nodes(1) as nodes,
        index_run(str(tmp_path / "index"), nodes.address, *arguments(images, encoder_name)) as run,
    ):
        wait_for(lambda: (nodes.kill(AT_WORK) and False) or not run.is_running, seconds=300)
        assert run.end() == 1, run.output
    last = run.output.splitlines()[-1]
    assert last.startswith("error: encode: the process of an encoder died")
    assert "--batch-size" in last


# What Prometheus sees


def scrape(node: dict[str, Any]) -> dict[str, float]:
    """The sums over all processes of a node's metrics of for_ray's index job, by name."""
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    sums: Counter[str] = Counter()
    for line in lines:
        if line.startswith("ray_for_ray_") and 'job="index"' in line:
            name, _, rest = line.partition("{")
            sums[name.removeprefix("ray_for_ray_")] += float(rest.rpartition("}")[2].split()[0])
    return sums


@pytest.mark.slow
def test_prometheus_sees_what_the_workers_do(draw, ray_address, encoder_name, tmp_path):
    import ray

    (node,) = [node for node in ray.nodes() if node["Alive"]]
    draw(tmp_path / "images", range(48))
    write_bad(tmp_path / "images")
    before = scrape(node)
    run_here(tmp_path / "images", tmp_path / "index", encoder_name)
    expected = {"images_read_total": 48, "images_encoded_total": 48, "images_quarantined_total": 2}
    found: dict[str, float] = {}

    def is_there() -> bool:
        after = scrape(node)
        found.update({name: after[name] - before[name] for name in after if name.endswith("_total")})
        found.update({name: after[name] for name in ("queue_images", "committed_images") if name in after})
        is_counted = all(found.get(name) == count for name, count in expected.items())
        return is_counted and found.get("committed_images") == 50  # of the driver, which tells it later

    with contextlib.suppress(AssertionError):
        wait_for(is_there, seconds=30)
    assert {name: found.get(name) for name in expected} == expected
    assert (found["queue_images"], found["committed_images"]) == (0, 50)
    for name in ("read_seconds_total", "encode_seconds_total", "encoder_wait_seconds_total"):
        assert 0 < found[name] < 120
    (report,) = (tmp_path / "index" / "reports").glob("*.json")
    work = RunReport.model_validate_json(report.read_text()).work
    assert work.num_actors == 2
    assert work.has_gpus
    for name in ("read_seconds", "encode_seconds", "write_seconds"):
        assert getattr(work, name) == pytest.approx(found[f"{name}_total"], rel=1e-3)
