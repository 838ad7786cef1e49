"""The index job and a search over a network that breaks one request in twenty, against the same without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import pytest

from for_ray.index import snapshots
from for_ray.schema import Layout
from for_ray.storage import lance_options, upload
from tests.proxy import KINDS, at_random, bad_network
from tests.seaweed import S3Server, environment, seaweed

pytestmark = [pytest.mark.s3, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 160


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with seaweed() as found:
        yield found


def run(job: str, *words: object) -> str:
    """The last line that a job prints."""
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *map(str, words), "--json"]
    without_ray = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, env=without_ray)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def index(bucket: str, folder: str, encoder_name: str) -> dict[str, Any]:
    given = ["--encoder", encoder_name, "--head", "dense", "--batch-size", 8, "--commit-seconds", 1]
    found: dict[str, Any] = json.loads(
        run("index", "--images", f"{bucket}/images", "--index", f"{bucket}/{folder}", *given)
    )
    return found


def rows_of(index_uri: str) -> list[tuple[object, ...]]:
    """Uri, etag, vectors and boxes of each image, by uri: what a run encodes, whenever it does."""
    layout = Layout(index_uri)
    snapshot = snapshots.latest(layout)
    uri = layout.images_uri(snapshot.fingerprint)
    images = lance.dataset(uri, version=snapshot.images_version, storage_options=lance_options(uri))
    columns = ["uri", "etag", "error", "vectors", "boxes"]
    return sorted(
        tuple(row[name] for name in columns) for row in images.to_table(columns=columns).to_pylist()
    )


def hits(answer: str) -> list[tuple[str, float]]:
    return [(hit["uri"], round(hit["score"], 5)) for hit in json.loads(answer)]


def test_a_bad_network_changes_nothing(
    draw: Callable[..., None], encoder_name: str, tmp_path: Path, server: S3Server
) -> None:
    draw(tmp_path / "images", range(NUM_IMAGES))
    bucket = f"s3://{server.make_bucket()}"
    with environment(server):
        for path in (tmp_path / "images").iterdir():
            upload(path, f"{bucket}/images/{path.name}")
        good = index(bucket, "good", encoder_name)
    with bad_network(server, at_random(0.05, seed=0)) as proxy:
        bad = index(bucket, "bad", encoder_name)
        print(len(proxy.requests), proxy.injected)
        found = run("search", "--index", f"{bucket}/bad", "a red field", "--top", 20)
    with environment(server):
        wanted = run("search", "--index", f"{bucket}/good", "a red field", "--top", 20)
        assert rows_of(f"{bucket}/bad") == rows_of(f"{bucket}/good")
    assert (good["new"], good["indexed"]) == (bad["new"], bad["indexed"]) == (NUM_IMAGES, NUM_IMAGES)
    assert hits(found) == hits(wanted)
    assert set(proxy.injected) == set(KINDS)
