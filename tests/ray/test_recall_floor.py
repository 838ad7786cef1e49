"""A build that finds too little leaves searches with what was published before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from for_ray.config import IndexSettings
from for_ray.errors import StageError
from for_ray.index import snapshots
from for_ray.pipeline.index import run_index
from for_ray.schema import Layout
from for_ray.stages.progress import Progress
from for_ray.stages.verify import Recall


@pytest.mark.slow
def test_a_build_under_min_recall_is_not_published_until_the_floor_is_lower(
    ray_address: str,
    encoder_name: str,
    draw: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw(tmp_path / "images", range(6))
    given = {"images": str(tmp_path / "images"), "index": str(tmp_path / "index"), "encoder": encoder_name}
    given |= {"head": "dense", "batch_size": 8, "read_threads": 4}

    def run(**settings: object) -> None:
        run_index(IndexSettings(**given, **settings), progress=Progress(is_quiet=True))

    # Six images are always found: what a lossy codec finds among millions is said instead of measured.
    monkeypatch.setattr("for_ray.stages.verify.measure_recall", lambda *_, nprobe, **__: Recall(0.7, nprobe))
    layout = Layout(str(tmp_path / "index"))
    with pytest.raises(StageError, match=r"recall@50 is 0\.700, under min_recall 0\.85; not published"):
        run()
    assert list(snapshots.list_snapshots(layout)) == []
    run(min_recall=0.7)
    (published,) = snapshots.list_snapshots(layout)
    assert (published.recall_at_50, published.indexed) == (0.7, 6)
