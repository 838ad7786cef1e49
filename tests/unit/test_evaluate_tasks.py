"""The evaluation job's tasks, up to where Ray begins: what is left to measure when images cannot be read."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from for_ray.config import EvaluateSettings
from for_ray.errors import DataError
from for_ray.evaluation.similarity import VectorSets
from for_ray.model.bundle import open_bundle
from for_ray.pipeline.evaluate_tasks import TaskRun
from for_ray.stages.cluster import Cluster
from for_ray.stages.progress import Progress


@pytest.mark.parametrize(("is_read", "num_unread"), [([1, 0, 1], 1), ([0, 0, 1], 2)])
def test_no_class_with_two_readable_images_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_read: list[int], num_unread: int
):
    (tmp_path / "set.csv").write_text("uri,label\n/1.jpg,a\n/2.jpg,a\n/3.jpg,b\n")
    settings = EvaluateSettings(
        dataset=f"labels:{tmp_path}/set.csv", task="image-to-image", encoder="picturebook#clip"
    )
    offsets = np.cumsum([0, *is_read])
    vectors = np.tile(np.array([[1.0, 0.0]], np.float32), (offsets[-1], 1))
    monkeypatch.setattr(TaskRun, "_embed", lambda *_: VectorSets(offsets, vectors))
    with contextlib.ExitStack() as stack:
        run = TaskRun(settings, Cluster(stack), Progress(is_quiet=True))
        message = f"no class of labels set has two images that can be read .*; {num_unread} cannot be read$"
        with pytest.raises(DataError, match=message):
            run._measure(open_bundle("picturebook", head="clip"))


def test_images_alone_in_their_class_are_counted_and_captions_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "set.csv").write_text("uri,label\n/1.jpg,a\n/2.jpg,a\n/3.jpg,b\n")
    (tmp_path / "pairs.csv").write_text("uri,caption\n/1.jpg,a cat\n,a dog\n/1.jpg,\n")
    vectors = VectorSets(np.arange(4), np.eye(2, dtype=np.float32)[[0, 0, 1]])
    monkeypatch.setattr(TaskRun, "_embed", lambda *_: vectors)
    heard: list[str] = []
    progress = Progress(is_quiet=True)
    progress.say = heard.append  # type: ignore[method-assign]

    def make(task: str, dataset: str) -> TaskRun:
        settings = EvaluateSettings(dataset=dataset, task=task, encoder="picturebook#clip")
        return TaskRun(settings, Cluster(stack), progress)

    with contextlib.ExitStack() as stack:
        run = make("knn", f"labels:{tmp_path}/set.csv")
        measures, _, counts = run._measure(open_bundle("picturebook", head="clip"))
        assert (measures["accuracy"], counts) == (
            pytest.approx(2 / 3),
            {"classes": 2, "alone_in_their_class": 1},
        )
        make("text-to-image", f"pairs:{tmp_path}/pairs.csv")
    assert heard[-1].startswith("pairs pairs: 1 images, 1 captions (1 empty and 0 repeated")
    assert heard[-1].endswith("; 1 rows without a uri left out")
