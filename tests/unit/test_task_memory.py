"""What a task may reserve is what segments and lists are laid out for."""

from __future__ import annotations

import contextlib
import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from for_ray.config import IndexSettings
from for_ray.index.plan import DEFAULT_MEMORY_BYTES, plan_index
from for_ray.pipeline.index import _Run
from for_ray.pipeline.index_write import IndexWriter
from for_ray.schema import Codec, Snapshot
from for_ray.stages import build, cluster, merge
from for_ray.stages.cluster import Cluster
from for_ray.stages.progress import Progress

GB = 10**9


@pytest.fixture
def cluster_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cluster of nodes with so much memory for tasks, as if it had been joined."""

    def make(*memory: int, setting: int = DEFAULT_MEMORY_BYTES) -> Cluster:
        nodes = [{"Resources": {"CPU": 4.0, "memory": float(each)}} for each in memory]
        monkeypatch.setattr(cluster, "_workers", lambda: nodes)
        made = Cluster(contextlib.ExitStack(), task_memory_bytes=setting)
        vars(made)["resources"] = {}
        return made

    return make


@pytest.mark.parametrize(
    ("memory", "setting", "reserved", "planned"),
    [
        ([42 * GB], 30 * GB, 21 * GB, 21 * GB),
        ([5 * GB], DEFAULT_MEMORY_BYTES, 2_500_000_000, 2_500_000_000),
        ([5 * GB, 42 * GB], DEFAULT_MEMORY_BYTES, DEFAULT_MEMORY_BYTES, DEFAULT_MEMORY_BYTES),
        ([], 30 * GB, 1, 30 * GB),
    ],
)
def test_a_task_is_planned_for_what_it_may_reserve(cluster_of, memory, setting, reserved, planned):
    found = cluster_of(*memory, setting=setting)
    assert found.task_memory_bytes == reserved
    assert found.planned_memory_bytes == planned


def test_segments_are_built_for_what_their_tasks_reserve(cluster_of, monkeypatch, tmp_path):
    given: dict[str, Any] = {}
    monkeypatch.setattr(build, "update_segments", lambda *_, **named: given.update(named))
    monkeypatch.setattr(merge, "merge_small", lambda *_, **__: "built")
    monkeypatch.setattr(IndexWriter, "_job", lambda *_: None)
    nothing: Any = SimpleNamespace()
    writer = IndexWriter(
        settings=IndexSettings(images=str(tmp_path), index=str(tmp_path / "index"), task_memory=30),
        layout=nothing,
        bundle=nothing,
        run_id="run",
        base=None,
        wanted_codec=None,
        cluster=cluster_of(42 * GB, setting=30 * GB),
        lease=nothing,
        progress=Progress(is_quiet=True),
        folder=tmp_path,
        found=nothing,
    )
    assert writer._build(None) == "built"
    assert given["memory_bytes"] == writer.cluster.task_memory_bytes == 21 * GB


def test_a_codec_does_not_drift_from_what_these_nodes_cannot_train(cluster_of, tmp_path: Path):
    plan = plan_index(10**9, 1024)
    codec = Codec(
        codec_id="c",
        file_name="codec-c.faiss",
        sha256="0" * 64,
        num_bytes=plan.codec_bytes,
        factory=plan.factory,
        dim=1024,
        nlist=plan.nlist,
        num_trained_on=plan.training_vectors,
    )
    base = Snapshot(
        snapshot_id=1,
        created_at=datetime.datetime.now(datetime.UTC),
        fingerprint="f",
        images_version=1,
        codec=codec,
        segments=[],
        deleted_image_ids=[],
        nprobe=1,
        listed=1,
        indexed=1,
        quarantined=0,
        num_vectors=10**9,
        recall_at_50=None,
    )
    run = _Run.__new__(_Run)
    run.settings = IndexSettings(images=str(tmp_path), index=str(tmp_path / "index"), task_memory=60)
    run.base = base
    drifted = "1,000,000,000 vectors want 65536 lists, it has 4096"
    assert run._drift(base, None) == drifted
    assert run._drift(base, cluster_of(500 * GB, setting=60 * GB)) == drifted
    assert run._drift(base, cluster_of(10 * GB, setting=60 * GB)) is None
