"""Runs of `jobs/index.py` as processes to be watched and killed, and indexes held against each other."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np

from for_ray.errors import ForRayError
from for_ray.index import snapshots, table
from for_ray.retrieval import open_index
from for_ray.schema import Layout
from for_ray.storage import lance_options

JOB = Path(__file__).parents[1] / "jobs" / "index.py"
TOLERANCE = 2e-3
"""Of float16 vectors: a sum of floats depends on the batch that an image is encoded in."""

NUM_ANSWERS = 20

Rows = dict[str, dict[str, Any]]


class IndexRun:
    """One run, in a process of its own, on the cluster of an address.

    Args:
        index_uri: The index.
        address: Of the Ray cluster.
        arguments: Of the job, but for `--index`.
        env: More variables for it.
    """

    def __init__(
        self, index_uri: str, address: str, *arguments: object, env: dict[str, str] | None = None
    ) -> None:
        self.index_uri = index_uri
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [sys.executable, str(JOB), "--index", index_uri, *map(str, arguments)],
            env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address, **(env or {})},
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self.process.poll() is None

    @property
    def output(self) -> str:
        """What it said so far."""
        self._output.seek(0)
        return self._output.read()

    def wait_for_rows(self, count: int, *, seconds: float = 300) -> Rows:
        """The rows that are committed, as soon as there are `count`; fewer if the run ends before."""
        end = time.monotonic() + seconds
        rows: Rows = {}
        while time.monotonic() < end and len(rows) < count and self.is_running:
            time.sleep(0.02)
            rows = committed_rows(self.index_uri)
        return rows

    def kill(self) -> None:
        """SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self, *, seconds: float = 600) -> int:
        """Wait for it; its exit code."""
        return self.process.wait(seconds)


@contextlib.contextmanager
def index_run(*arguments: Any, **more: Any) -> Iterator[IndexRun]:
    """A run that does not outlive the block."""
    run = IndexRun(*arguments, **more)
    try:
        yield run
    finally:
        run.kill()


def committed_rows(index_uri: str) -> Rows:
    """What the table of the index's only encoder holds, by uri; nothing where it can't be read now."""
    found: Rows = {}
    with contextlib.suppress(ForRayError, OSError):
        uri = _only_table(index_uri)
        images = table.open_table(uri) if uri else None
        if images is not None:
            columns = ["uri", "etag", "error", "encoded_at"]
            found = {row["uri"]: row for row in images.to_table(columns, with_row_id=True).to_pylist()}
    return found


def _only_table(index_uri: str) -> str | None:
    from for_ray.storage import is_s3, list_objects

    layout = Layout(index_uri)
    if not is_s3(index_uri):
        paths = list(Path(index_uri).glob("encoder-*"))
        return layout.images_uri(paths[0].name.removeprefix("encoder-")) if paths else None
    uris = (entry.uri for page in list_objects(index_uri) for entry in page)
    names = (uri.removeprefix(f"{index_uri}/").split("/")[0] for uri in uris)
    fingerprint = next((name.removeprefix("encoder-") for name in names if name.startswith("encoder-")), None)
    return layout.images_uri(fingerprint) if fingerprint else None


def published_rows(index_uri: str) -> list[dict[str, Any]]:
    """The rows of the published snapshot's table, with their row ids."""
    layout = Layout(index_uri)
    snapshot = snapshots.latest(layout)
    uri = layout.images_uri(snapshot.fingerprint)
    images = lance.dataset(uri, version=snapshot.images_version, storage_options=lance_options(uri))
    return list(images.to_table(with_row_id=True).to_pylist())


def encoded_again(committed: Rows, index_uri: str) -> list[str]:
    """Uris that had been committed and have another row, or another time, in the published table."""
    rows = {row["uri"]: row for row in published_rows(index_uri)}
    return [uri for uri, row in committed.items() if uri not in rows or not row.items() <= rows[uri].items()]


def differences(index_uri: str, undisturbed_uri: str, *, cache_path: Path | None = None) -> dict[str, int]:
    """How many images and answers of an index are not those of another one of the same images."""
    mine, its = published_rows(index_uri), published_rows(undisturbed_uri)
    ours, theirs = ({row["uri"]: row for row in rows} for rows in (mine, its))
    both = [(ours[uri], theirs[uri]) for uri in theirs if uri in ours]
    return {
        "lost": len(theirs.keys() - ours.keys()),
        "unknown": len(ours.keys() - theirs.keys()),
        "duplicated": sum(times - 1 for times in Counter(row["uri"] for row in mine).values()),
        "errors": sum(one["error"] != other["error"] for one, other in both),
        "vectors": sum(not _is_close(one["vectors"], other["vectors"]) for one, other in both),
        "boxes": sum(one["boxes"] != other["boxes"] for one, other in both),
        "answers": _different_answers(index_uri, undisturbed_uri, cache_path),
    }


def _is_close(mine: list[Any] | None, its: list[Any] | None) -> bool:
    one, other = np.array(mine or [], np.float32), np.array(its or [], np.float32)
    return one.shape == other.shape and bool((np.abs(one - other) <= TOLERANCE).all())


def _different_answers(index_uri: str, undisturbed_uri: str, cache_path: Path | None) -> int:
    """Of some queries the ranks whose score, or whose image by more than rounding, is another."""
    one, other = (open_index(uri, cache_path=cache_path) for uri in (index_uri, undisturbed_uri))
    queries = np.random.default_rng(0).normal(size=(8, one.bundle.dim)).astype(np.float32)
    count = 0
    for query in queries / np.linalg.norm(queries, axis=1, keepdims=True):
        mine, its = one.search_vector(query, k=NUM_ANSWERS), other.search_vector(query, k=2 * NUM_ANSWERS)
        scores = {hit.uri: hit.score for hit in its}
        for rank, hit in enumerate(mine):
            is_same = abs(scores.get(hit.uri, np.inf) - hit.score) <= TOLERANCE
            count += not (is_same and abs(its[rank].score - hit.score) <= TOLERANCE)
    return count
