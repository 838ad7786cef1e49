"""Index the same images from disk and from a real S3 server, and hold the two indexes against each other.

    python benchmarks/s3_and_disk.py [--images 10000]

Runs `jobs/index.py` and `jobs/search.py` as a user does, SeaweedFS on loopback as the bucket, and prints one
JSON object: the summary of each run, and how many images, vectors, boxes and ranked answers differ. Exit code
1 if any do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 2e-3
"""Of float16 vectors: a sum of floats depends on the batch that an image is encoded in."""

QUESTIONS = ("a dog", "a red car", "a wheelchair", "an umbrella")


def main() -> int:
    """Run the comparison; the exit code says whether the two indexes are equal."""
    sys.path.insert(0, str(ROOT))
    from tests.seaweed import environment, seaweed

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    with (
        tempfile.TemporaryDirectory(prefix="for_ray-s3-") as folder,
        seaweed() as server,
        environment(server),
    ):
        images = _draw(Path(folder), parser.parse_args().images)
        bucket = f"s3://{server.make_bucket()}"
        _upload(images, bucket)
        report = _compare(str(images), f"{folder}/index", f"{bucket}/images", f"{bucket}/index")
    print(json.dumps(report, indent=2))
    return int(any(report["differences"].values()))


def _draw(folder: Path, count: int) -> Path:
    out = folder / "picturebook"
    _run("-m", "for_ray.datasets.picturebook", "--out", out, "--images", count, "--split", "val")
    return out / "images"


def _upload(images: Path, bucket: str) -> None:
    from for_ray.storage import upload

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda path: upload(path, f"{bucket}/images/{path.name}"), sorted(images.iterdir())))


def _compare(disk_images: str, disk_index: str, s3_images: str, s3_index: str) -> dict[str, Any]:
    runs = {name: _index(images, index) for name, images, index in (
        ("disk", disk_images, disk_index), ("s3", s3_images, s3_index), ("s3_again", s3_images, s3_index)
    )}  # fmt: skip
    disk, s3 = _rows(disk_index), _rows(s3_index)
    same_names = disk["name"].equals(s3["name"])
    differences = {
        "images": 0 if same_names else len(set(disk["name"].to_pylist()) ^ set(s3["name"].to_pylist())) or 1,
        "vectors": _unequal(disk["vectors"], s3["vectors"]) if same_names else None,
        "boxes": _unequal(disk["boxes"], s3["boxes"]) if same_names else None,
        "answers": sum(_search(disk_index, text) != _search(s3_index, text) for text in QUESTIONS),
        "encoded_again": runs["s3_again"]["new"] + runs["s3_again"]["changed"],
    }
    return {"runs": runs, "differences": differences}


def _index(images: str, index: str) -> dict[str, Any]:
    out = _run("jobs/index.py", "--images", images, "--index", index, "--json")
    return dict(json.loads(out.splitlines()[-1]))


def _rows(index: str) -> pa.Table:
    """The table of an index by file name, which is what the two have in common."""
    import lance

    from for_ray.index.snapshots import latest
    from for_ray.schema import Layout
    from for_ray.storage import lance_options

    layout = Layout(index)
    snapshot = latest(layout)
    uri = layout.images_uri(snapshot.fingerprint)
    table = lance.dataset(uri, version=snapshot.images_version, storage_options=lance_options(uri)).to_table(
        columns=["uri", "vectors", "boxes", "error"]
    )
    names = pa.array([uri.rsplit("/", 1)[-1] for uri in table["uri"].to_pylist()])
    return table.append_column("name", names).sort_by("name").combine_chunks()


def _unequal(one: pa.ChunkedArray, other: pa.ChunkedArray) -> int:
    """Rows that differ by more than `TOLERANCE` anywhere; in what order an image's slots stand counts too."""
    pairs = zip(one.to_pylist(), other.to_pylist(), strict=True)
    return sum(not _is_close(np.array(mine, float), np.array(its, float)) for mine, its in pairs)


def _is_close(mine: NDArray[np.float64], its: NDArray[np.float64]) -> bool:
    return mine.shape == its.shape and bool((np.abs(mine - its) <= TOLERANCE).all())


def _search(index: str, text: str) -> list[tuple[str, float, list[float]]]:
    hits = json.loads(_run("jobs/search.py", "--index", index, text, "--json"))
    return sorted((hit["uri"].rsplit("/", 1)[-1], hit["score"], hit["box"]) for hit in hits)


def _run(*words: object) -> str:
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
