"""What listing, comparing and planning cost the driver: memory and time for 10,000 to 1,000,000 objects.

    python benchmarks/listing.py                                # three runs of each size
    python benchmarks/listing.py --sizes 10000000 --runs 1

A process of its own answers S3's list requests with made-up objects, 1,000 a page; a real Lance table holds
as many rows, 1 % of them gone from the bucket, 1 % with another etag, and 1 % of the objects are new. Each
run is a fresh process that does what the index job does before it encodes: `write_listing`, `write_gap`,
`count_held` and `plan_index`. Its clock starts when modules are loaded and the connection is made (these cost
the same for any number), its memory is the kernel's high-water mark of the process (VmHWM). The sizes take
turns, and medians are compared. As many runs of the largest size read a manifest in the place of the list
requests, and cut its rows into as few parts as give each as many rows as a part of 10⁸ objects has, so that
memory for 10⁸ is measured and not guessed.

Prints a line of JSON for each run and one for the medians. Exit code 1 if memory grows by more than 200 MB
from the first size to the last, or an object costs 15 % more or less time there than at the size before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

SIZES = (10_000, 100_000, 1_000_000)
PAGE, PERCENT = 1000, 100
MANY = 10**8
MOST_GROWTH_MB, MOST_SKEW = 200, 0.15

ROWS_OF_A_FRAGMENT = 50_000
DIM = 128
SLOTS = 20
"""Of an image, for the plan: the rows of the table hold no vectors."""


def main() -> int:
    """Measure; the exit code says whether memory is flat and time linear."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="objects; ascending")
    parser.add_argument("--runs", type=int, default=3, help="of each size")
    parser.add_argument("--role", choices=["store", "table", "driver"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--as-many", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role == "store":
        serve()
    elif given.role == "table":
        make_table(given.folder, given.sizes[0])
        make_manifest(given.folder, given.sizes[0])
    elif given.role == "driver":
        print(json.dumps(drive(given.folder, given.sizes[0], as_many=given.as_many)), flush=True)
    else:
        return compare(given.sizes, given.runs)
    return 0


def compare(sizes: list[int], runs: int) -> int:
    """All runs, and what comes out of them."""
    done: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    as_many: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="for_ray-listing-") as folder, _store() as endpoint:
        for size in sizes:
            _start("table", folder, size)
        for _ in range(runs):
            for size in sizes:
                done[size].append(_measure(folder, size, endpoint))
            as_many.append(_measure(folder, sizes[-1], endpoint, "--as-many"))
    medians = {size: _medians(done[size]) for size in sizes}
    many = _extrapolate(medians[sizes[-1]], _medians(as_many))
    result: dict[str, Any] = {"runs": runs, "sizes": medians, "many": many}
    is_right = True
    if len(sizes) > 1:
        result["growth_mb"] = round(medians[sizes[-1]]["peak_mb"] - medians[sizes[0]]["peak_mb"], 1)
        last, before = (medians[size]["microseconds_per_object"] for size in (sizes[-1], sizes[-2]))
        result["time_per_object_last_over_before"] = round(last / before, 3)
        is_right = result["growth_mb"] <= MOST_GROWTH_MB and abs(last / before - 1) <= MOST_SKEW
    print(json.dumps(result))
    return 0 if is_right else 1


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    medians = {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
    return medians | {"microseconds_per_object": round(1e6 * medians["seconds"] / medians["objects"], 3)}


def _extrapolate(largest: dict[str, float], as_of_many: dict[str, float]) -> dict[str, float]:
    """What `MANY` objects need, from the largest size and from the run with parts of their size."""
    factor = MANY / largest["objects"]
    return {
        "objects": MANY,
        "rows_of_a_part": as_of_many["rows_of_a_part"],
        "peak_mb_with_such_parts": as_of_many["peak_mb"],
        "disk_gb": round(factor * largest["disk_mb"] / 1000, 1),
        "list_requests": MANY // PAGE,
        "minutes_of_listing": round(factor * largest["list_seconds"] / 60, 1),
        "minutes_of_reading_a_manifest": round(factor * as_of_many["list_seconds"] / 60, 1),
        "minutes_of_comparing": round(factor * largest["diff_seconds"] / 60, 1),
    }


def _measure(folder: str, size: int, endpoint: str, *words: str) -> dict[str, Any]:
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
    }
    measured: dict[str, Any] = json.loads(_start("driver", folder, size, *words, **environment))
    print(json.dumps(measured), flush=True)
    return measured


def _start(role: str, folder: str, size: int, *words: object, **environment: str) -> str:
    command = [sys.executable, __file__, "--role", role, "--folder", folder, "--sizes", size, *words]
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment
    )
    return done.stdout


def drive(folder: Path, size: int, *, as_many: bool) -> dict[str, float]:
    """One run, in this process; `as_many`: from a manifest, with parts of the size of those of `MANY`."""
    from for_ray.index.plan import plan_index
    from for_ray.index.table import count_held, require_table, scan_state
    from for_ray.stages.diff import write_gap
    from for_ray.stages.listing import write_listing
    from for_ray.storage import exists, spill

    source = f"s3://bucket/{size}"
    if as_many:
        source, spill.NUM_PARTS = f"{folder}/manifest-{size}.parquet", max(1, spill.NUM_PARTS * size // MANY)
    exists("s3://bucket/none")
    images = require_table(str(folder / f"table-{size}"))
    base_mb = _peak_mb()
    with tempfile.TemporaryDirectory(dir=folder) as work:
        started = time.perf_counter(), time.process_time()
        listing = write_listing(source, Path(work) / "listing")
        listed = time.perf_counter()
        gap = write_gap(
            listing.rows, scan_state(images), folder=Path(work) / "diff", gap_uri=f"{work}/diff/gap"
        )
        compared = time.perf_counter()
        held = count_held(images, 0)
        plan_index(SLOTS * held.num_images, DIM)
        ended, cpu = time.perf_counter(), time.process_time()
        disk_mb = sum(path.stat().st_size for path in Path(work).rglob("*") if path.is_file()) / 1e6
    some = size // PERCENT
    found = (gap.num_new, gap.num_changed, gap.num_gone, gap.num_unchanged, held.num_images)
    if found != (some, some, some, size - 2 * some, size):
        raise SystemExit(f"the gap of {size} objects is wrong: {gap}")
    return {
        "objects": size,
        "peak_mb": _peak_mb(),
        "base_mb": base_mb,
        "seconds": ended - started[0],
        "cpu_seconds": cpu - started[1],
        "list_seconds": listed - started[0],
        "diff_seconds": compared - listed,
        "plan_seconds": ended - compared,
        "disk_mb": disk_mb,
        "rows_of_a_part": size // listing.rows.num_parts,
    }


def _peak_mb() -> float:
    """The most memory that this process has had; unlike `ru_maxrss`, without that of who started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit(
            "the kernel does not tell a process's peak memory; expected VmHWM in /proc/self/status"
        )
    return round(int(found[1]) * 1024 / 1e6, 1)


def key_of(size: int, number: int) -> str:
    """The key of an object, in the order of its number; as long as keys are in real buckets."""
    name = hashlib.blake2b(number.to_bytes(8), digest_size=8).hexdigest()
    return f"{size}/images/{number // 10_000:06d}/{number:09d}-{name}.jpg"


def etag_of(number: int) -> str:
    """32 hex digits that no compression shortens much."""
    return hashlib.blake2b(number.to_bytes(8), digest_size=16).hexdigest()


def make_manifest(folder: Path, size: int) -> None:
    """The objects as a manifest."""
    from for_ray.schema import LISTING_SCHEMA

    with pq.ParquetWriter(folder / f"manifest-{size}.parquet", LISTING_SCHEMA) as writer:
        for first in range(0, size, ROWS_OF_A_FRAGMENT):
            numbers = range(first, min(first + ROWS_OF_A_FRAGMENT, size))
            columns = [
                [f"s3://bucket/{key_of(size, number)}" for number in numbers],
                list(map(etag_of, numbers)),
                [50_000 + number % 100_000 for number in numbers],
            ]
            writer.write_table(pa.table(columns, schema=LISTING_SCHEMA))


def make_table(folder: Path, size: int) -> None:
    """The index's table: the objects but for the first 1 %, 1 % of these changed, and 1 % behind them."""
    from for_ray.index import table
    from for_ray.schema import images_schema

    schema = images_schema(DIM)
    uri, some = str(folder / f"table-{size}"), size // PERCENT
    images = table.create_table(uri, schema)
    fragments: list[str] = []
    for first in range(some, size + some, ROWS_OF_A_FRAGMENT):
        numbers = range(first, min(first + ROWS_OF_A_FRAGMENT, size + some))
        is_changed = [number < size and (number - some) % (PERCENT - 1) == 0 for number in numbers]
        columns = {
            "uri": [f"s3://bucket/{key_of(size, number)}" for number in numbers],
            "etag": [
                etag_of(number + MANY * changed) for number, changed in zip(numbers, is_changed, strict=True)
            ],
        }
        nulls = {
            field.name: pa.nulls(len(numbers), field.type) for field in schema if field.name not in columns
        }
        rows = pa.table({field.name: (columns | nulls)[field.name] for field in schema}, schema=schema)
        fragments += table.write_fragments(rows, uri)
    table.append(images, fragments)


@contextmanager
def _store() -> Iterator[str]:
    """The address of a store that answers list requests, in its own process."""
    command = [sys.executable, __file__, "--role", "store"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def serve() -> None:
    """Answer until the process is ended; the first line of the output is the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _ListHandler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    thread.join()


class _ListHandler(BaseHTTPRequestHandler):
    """S3's ListObjectsV2 over the prefixes `<size>/`, of as many made-up objects; nothing elsewhere."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """One page."""
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        prefix = asked.get("prefix", "").strip("/")
        size, first = int(prefix) if prefix.isdigit() else 0, int(asked.get("continuation-token", 0))
        end = min(first + PAGE, size)
        more = f"<NextContinuationToken>{end}</NextContinuationToken>" if end < size else ""
        objects = "".join(_object(size, number) for number in range(first, end))
        self._answer(
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name>'
            f"<Prefix>{prefix}/</Prefix><KeyCount>{end - first}</KeyCount><MaxKeys>{PAGE}</MaxKeys>"
            f"<EncodingType>url</EncodingType><IsTruncated>{str(end < size).lower()}</IsTruncated>"
            f"{more}{objects}</ListBucketResult>"
        )

    def do_HEAD(self) -> None:
        """No object can be read."""
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _object(size: int, number: int) -> str:
    return (
        f"<Contents><Key>{key_of(size, number)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{etag_of(number)}&quot;</ETag><Size>{50_000 + number % 100_000}</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
    )


if __name__ == "__main__":
    sys.exit(main())
