"""A tuning whose disk fills up: one line that names the place, at once, whoever has to stop with it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from for_ray.config import FinetuneSettings
from for_ray.datasets.instances import write_instances
from for_ray.errors import StageError
from for_ray.pipeline.tower_tuning import run_tower_tuning
from for_ray.stages import finetune
from for_ray.stages.progress import Progress


class FullDisk(FSSpecHandler):  # type: ignore[misc]  # pyarrow has no types
    """A disk with no room for a checkpoint; each that is tried leaves a line in a file."""

    def __init__(self, tried: str) -> None:
        super().__init__(LocalFileSystem())
        self.tried = tried

    def __reduce__(self) -> tuple[Any, ...]:
        return FullDisk, (self.tried,)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        if path.endswith(finetune.CHECKPOINT_FILE):
            with Path(self.tried).open("a") as file:
                file.write(f"{path}\n")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().open_output_stream(path, metadata)


@pytest.mark.slow
def test_a_full_disk_ends_a_tuning_at_once_and_it_goes_on_when_there_is_room(
    ray_address, tmp_path, monkeypatch
):
    """Workers that were started again would find it as full, and the second must not wait for the first."""
    write_instances(tmp_path / "set", instances=3, views=2, split="train", processes=1)
    settings = FinetuneSettings(
        recipe="gpr", dataset=f"labels:{tmp_path}/set/labels.csv", output=f"{tmp_path}/out", epochs=2,
        batch_size=4, image_size=32, device="cpu", read_threads=2, workers=2,
    )  # fmt: skip
    tried = tmp_path / "tried"
    message = f"^finetune: cannot write {tmp_path}/out/training: no space is left on the disk; free space or"
    with monkeypatch.context() as full:
        full.setattr(finetune, "arrow_filesystem", lambda uri: (PyFileSystem(FullDisk(str(tried))), uri))
        with pytest.raises(StageError, match=message):
            run_tower_tuning(settings, progress=Progress(is_quiet=True))
    assert len(tried.read_text().splitlines()) == 1
    summary = run_tower_tuning(settings, progress=Progress(is_quiet=True))
    assert summary.message.startswith("trained 2 epochs")
