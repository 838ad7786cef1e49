"""What the encode stage costs over a bare loop: images/s of one over images/s of the other.

    python benchmarks/encode.py                                   # RN50 with random weights at 224 px
    python benchmarks/encode.py --encoder picturebook --images 4096

Both encode the same pixels, decoded and in memory, with the same model, batch and threads. The bare loop
calls the encoder batch after batch. The stage is that of the index job, from the gap to files of the table,
except that its reading tasks take pixels from memory; it is timed in its actor, from the end of the first
block to the end of the last, so that starting processes does not count, and waiting for pixels does. The two
take turns, and the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from for_ray.index import table as images_table
from for_ray.model.bundle import Bundle, open_bundle
from for_ray.schema import LISTING_SCHEMA, images_schema
from for_ray.stages.cluster import Cluster

DISTINCT_IMAGES = 64


def main() -> None:
    """Measure, and print a line of JSON for each run and one for the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="open_clip:RN50@random", help="as jobs/index.py takes it")
    parser.add_argument("--head", default="clip", help="sum, cluster, dense or clip")
    parser.add_argument("--image-size", type=int, default=None, help="in pixels; default: the encoder's")
    parser.add_argument("--images", type=int, default=512, help="images of a run")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    bundle = open_bundle(given.encoder, head=given.head, image_size=given.image_size, allow_untrained=True)
    with ExitStack() as stack:
        cluster = Cluster(stack)
        _ = cluster.resources
        runs = [measure(bundle, given.images, batch_size=given.batch_size) for _ in range(given.runs)]
    bare = statistics.median(run["bare"] for run in runs)
    staged = statistics.median(run["stage"] for run in runs)
    result = {
        "encoder": given.encoder,
        "head": given.head,
        "image_size": bundle.image_size,
        "batch_size": given.batch_size,
        "bare_images_per_second": round(bare, 1),
        "stage_images_per_second": round(staged, 1),
        "ratio": round(statistics.median(run["stage"] / run["bare"] for run in runs), 3),
        "overhead_microseconds_per_image": round(1e6 * (1 / staged - 1 / bare)),
    }
    print(json.dumps(result))


def measure(bundle: Bundle, num_images: int, *, batch_size: int) -> dict[str, float]:
    """Images/s of the bare loop and of the stage, one behind the other."""
    run = {
        "bare": bare_loop(bundle, num_images, batch_size=batch_size),
        "stage": run_stage(bundle, num_images, batch_size=batch_size),
    }
    print(json.dumps({name: round(value, 1) for name, value in run.items()}), flush=True)
    return run


def bare_loop(bundle: Bundle, num_images: int, *, batch_size: int) -> float:
    """Images/s of the encoder alone, one thread on the CPU, as an actor of the stage has."""
    import torch

    from for_ray.model.encoder import load_encoder

    torch.set_num_threads(1)
    encoder = load_encoder(bundle)
    pixels = torch.from_numpy(some_pixels(batch_size, bundle.image_size))
    encoder.encode(pixels).vectors.cpu()
    started = time.perf_counter()
    for _ in range(num_images // batch_size):
        vectors = encoder.encode(pixels).vectors
    vectors.cpu()  # waits for a GPU
    return num_images // batch_size * batch_size / (time.perf_counter() - started)


def run_stage(bundle: Bundle, num_images: int, *, batch_size: int) -> float:
    """Images/s of the stage with one actor."""
    from for_ray.stages.blocks import EncodeJob
    from for_ray.stages.encode import choose_pool, make_dataset

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle.save(str(folder / "bundle"))
        images = images_table.create_table(str(folder / "images.lance"), images_schema(bundle.dim))
        job = EncodeJob.of(
            bundle, str(folder / "bundle"), images, device="auto", batch_size=batch_size, read_threads=1
        )
        pool = choose_pool({"CPU": 1.0}, num_batches=1)
        # A block more, for the first one is not timed.
        num_rows = num_images + job.block_rows(num_images, pool.max_actors)
        rows = [[f"{number}" for number in range(num_rows)], ["etag"] * num_rows, [1] * num_rows]
        (folder / "gap").mkdir()
        pq.write_table(pa.table(rows, schema=LISTING_SCHEMA), folder / "gap" / "gap.parquet")
        dataset = make_dataset(
            str(folder / "gap"),
            job=job,
            pool=pool,
            num_images=num_images,
            read=pixels_from_memory,
            encode_with=_timed_actor(str(folder / "times.jsonl")),
        )
        stored = sum(
            block["stored"].to_numpy().sum() for block in dataset.iter_batches(batch_format="pyarrow")
        )
        times = [json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines()]
    assert stored == num_rows
    return float(sum(rows for rows, _ in times[1:]) / (times[-1][1] - times[0][1]))


def pixels_from_memory(block: pa.Table, *, job: Any) -> pa.Table:
    """What `read_block` gives, without fetching and decoding."""
    size = job.image_size
    pixels = np.resize(some_pixels(DISTINCT_IMAGES, size), (block.num_rows, 3, size, size))
    columns: dict[str, Any] = {
        "width": pa.array([size] * block.num_rows, pa.int32()),
        "height": pa.array([size] * block.num_rows, pa.int32()),
        "error": pa.nulls(block.num_rows, pa.string()),
        "status": pa.array([0] * block.num_rows, pa.int8()),
        "pixels": pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 3 * size * size),
    }
    for name, column in columns.items():
        block = block.append_column(name, column)
    return block


def some_pixels(count: int, size: int) -> np.ndarray:
    """Noise [count, 3, size, size] uint8; a network's speed does not depend on what it sees."""
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def _timed_actor(times_path: str) -> Any:
    from for_ray.stages.blocks import EncodeImages

    class Timed(EncodeImages):
        """Writes down when it was done with a block."""

        def __call__(self, block: pa.Table) -> pa.Table:
            encoded = super().__call__(block)
            with Path(times_path).open("a") as file:
                file.write(json.dumps([block.num_rows, time.perf_counter()]) + "\n")
            return encoded

    return Timed


if __name__ == "__main__":
    main()
