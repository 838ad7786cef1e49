"""What a night costs: the index job on 20,000 images, then on the same with 1 % of them new, changed or gone.

    python benchmarks/nightly.py [--images 20000] [--nights 5] [--folder FOLDER]

Runs `jobs/index.py` as a user does, each run in a process and a Ray of its own. Of a night's 1 %, six tenths
are new images, two tenths changed, two tenths gone. What Ray's start costs, with its workers, their imports
and the model, is what a run takes that finds one new image: it is taken off both sides. Prints one JSON
object: seconds of the full run, of each night and of that start, and the share that a night has of the full
run, without it and with all of it but `ray.init`; segments and dead vectors after each night; a run on the
same bucket unchanged. Exit code 1 if the median night takes more than 5 % of the full run, or an image is
lost or found twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHANGE = 0.01
NEW, CHANGED = 0.6, 0.2
MOST_SHARE = 0.05
NUM_STARTS = 3


def main() -> int:
    """Run the nights; the exit code says whether they cost what they may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--nights", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the pictures are drawn, or were; kept")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="for_ray-nights-")))
        report = _measure(home, arguments.folder or home, arguments.images, arguments.nights)
    print(json.dumps(report, indent=2))
    return int(report["share_of_full_run"] > MOST_SHARE or not report["is_complete"])


def _measure(home: Path, drawn: Path, num_images: int, num_nights: int) -> dict[str, Any]:
    num_spare = int(num_nights * num_images * CHANGE) + num_nights
    pages = iter(_draw(drawn, num_images + num_spare))
    images, index = home / "images", home / "index"
    images.mkdir()
    for _ in range(num_images):
        _add(images, next(pages))
    full = _run(images, index)
    nights = []
    for night in range(num_nights):
        _change(images, pages, int(num_images * CHANGE), seed=night)
        nights.append(_run(images, index))
    idle = _run(images, index)
    starts = _run_on_ones(home, sorted(images.iterdir())[: 1 + NUM_STARTS])
    night = statistics.median(night["seconds"] for night in nights)
    init = statistics.median(night["ray_start_seconds"] for night in nights)
    start = statistics.median(starts)
    return {
        "images": num_images,
        "start_seconds": starts,
        "full_run": full,
        "nights": nights,
        "unchanged": idle,
        "share_of_full_run": round((night - start) / (full["seconds"] - start), 4),
        "share_with_all_but_ray_init": round((night - init) / (full["seconds"] - init), 4),
        "is_complete": idle["indexed"] == len(list(images.iterdir())),
    }


def _draw(folder: Path, count: int) -> list[Path]:
    command = ["-m", "for_ray.datasets.picturebook", "--out", folder / "book", "--images", count]
    subprocess.run([sys.executable, *map(str, command), "--split", "val"], check=True, cwd=ROOT, stdout=2)
    return sorted((folder / "book" / "images").iterdir())


def _add(images: Path, page: Path) -> None:
    (images / page.name).hardlink_to(page) if page.stat().st_dev == images.stat().st_dev else shutil.copy(
        page, images
    )


def _change(images: Path, pages: Iterator[Path], count: int, *, seed: int) -> None:
    """A night's change: `count` images new, changed or gone."""
    chosen = random.Random(seed).sample(sorted(images.iterdir()), count)
    num_new, num_changed = int(NEW * count), int(CHANGED * count)
    for _ in range(num_new):
        _add(images, next(pages))
    for path in chosen[:num_changed]:
        path.unlink()  # else the page behind the link would change
        shutil.copyfile(next(pages), path)
    for path in chosen[num_changed : count - num_new]:
        path.unlink()


def _run_on_ones(home: Path, pages: list[Path]) -> list[float]:
    """Seconds of each run on an index of next to nothing that has one new image."""
    images = home / "ones"
    images.mkdir()
    seconds = []
    for page in pages:
        shutil.copy(page, images)
        seconds.append(float(_run(images, home / "ones-index")["seconds"]))
    return seconds[1:]  # the first one asks the text tower for the queries that recall is measured with


def _run(images: Path, index: Path) -> dict[str, Any]:
    """One run of the job: wall seconds of the process, and what its summary and its report say."""
    command = [
        sys.executable,
        str(ROOT / "jobs" / "index.py"),
        "--images",
        str(images),
        "--index",
        str(index),
    ]
    started = time.monotonic()
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, check=True, cwd=index.parent)
    seconds = time.monotonic() - started
    summary = json.loads(done.stdout.splitlines()[-1])
    report = json.loads(max(index.glob("reports/*.json"), key=os.path.getmtime).read_text())
    stages = {stage["name"]: round(stage["seconds"], 2) for stage in report["stages"]}
    counts = ("new", "changed", "gone", "indexed", "vectors", "segments", "recall_at_50")
    return {
        "seconds": round(seconds, 2),
        "ray_start_seconds": stages.get("start", 0.0),
        **{name: summary[name] for name in counts},
        "dead_share": round(report["dead_vectors"] / max(1, report["num_vectors"]), 4),
        "stages": stages,
    }


if __name__ == "__main__":
    sys.exit(main())
