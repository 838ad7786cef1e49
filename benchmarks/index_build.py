"""Building an index by this package and by autofaiss: the same vectors, threads and memory.

    python benchmarks/index_build.py --work FOLDER [--vectors 1000000] [--dim 256] [--book 12500]
                                     [--threads 2] [--memory 4294967296] [--timeout 3600] [--runs 3] [--json]

Two sets: `clustered`, made up like public sets of embeddings (`vector_sets.py`: clusters of many sizes, few
axes that say most), and the picture book's pages by the package's encoder, about 8 vectors of 128 dimensions
each. autofaiss runs in a venv of its own, which this script makes in the folder. Its indexes:

    its choice    autofaiss chooses; the index may fill 0.8 of the memory
    our bytes     autofaiss chooses; the index may take as many bytes as ours does by the plan
    a quick key   a product quantizer without OPQ, with our lists and no more than our bytes, and our first
                  nprobe: what someone who knows FAISS would ask autofaiss for, not what it chooses or tunes

Ours is built as the plan has it, with 3 and 8 bits, and with 4-bit scalars (`scalars`), which take next to
no time to make: what RaBitQ's scale of each vector costs is the rest. `build` is from the vectors in a .npy
file to the index on disk, the search's parameters chosen; each build is a process of its own, whose peak
memory is the kernel's (VmHWM). Builds take turns; the figure is the median of the runs, of one where a build
takes over 5 minutes. One that is not done in time is no figure, only `not done`. `bytes` are the index's
file: codes, ids and centroids. The float16 vectors, 2·D bytes a vector, come on top for either side if it
re-ranks; both do.

Recall@50 is of vectors, for queries that are not in the set, against the comparison with all. A query runs
alone on one thread, asked by the same code on both sides: by the codes alone, and re-ranked, the 200 best
compared exactly with the float16 vectors. The parameters are those that each side chose: ours looks for 0.95
re-ranked, autofaiss for the most within its default of 10 ms a query. Then both are asked with twice as much
to look at until it finds no more; `at 0.95` is the time of the first that finds so much, re-ranked.

Not measured: Ray, Lance and the upload, which a build of ours has around it.

Exit code 1 unless, for each index that autofaiss chose and built in time, at least one of a set, one of ours
with no more bytes finds no less, re-ranked, and is built 5 times faster. Recalls that differ by less than
0.001 count as the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder alone

from benchmarks.autofaiss_side import Search, asked, peak_mb, rerank
from benchmarks.index_comparison import BY_HAND, judge, print_table
from benchmarks.vector_sets import (
    RANKED,
    VectorSet,
    exact_rows,
    picture_book_set,
    read_rows,
    recall,
    scattered_set,
)
from for_ray.index.codec import codec_to_bytes, train_codec
from for_ray.index.plan import DEFAULT_TARGET_RECALL, FLAT_BELOW, ID_BYTES, IndexPlan, plan_index
from for_ray.index.search import SegmentSet, num_candidates
from for_ray.index.segment import build_segment
from for_ray.schema import image_ids_of, pack_vector_ids

REQUIREMENTS = ("autofaiss==2.18.0", "faiss-cpu==1.13.2", "pyarrow==20.0.0")
"""autofaiss 2.18 names arguments as FAISS from 1.14 on does not take them; the newest that it works with."""

OURS = {"plan": None, "3 bits": "RaBitQ3", "8 bits": "RaBitQ8", "scalars": "SQ4"}
THEIRS = ("its choice", "our bytes", BY_HAND)
INDEX_SHARE = 0.8
LONG_SECONDS = 300
"""A build that takes longer is not repeated."""

NUM_TUNING = 100
LEAST_GAIN = 0.002
"""As in `stages.verify`: where twice the lists gain less recall, it is the code that holds it back."""


class Contender(NamedTuple):
    """An index to build: by which program, with what."""

    name: str
    command: list[str]
    options: dict[str, Any]
    is_ours: bool


def main() -> int:
    """Make the sets, build all, compare; or, as a child, build or ask one index."""
    if sys.argv[1:2] in (["build"], ["ask"]):
        role = {"build": build, "ask": ask}[sys.argv[1]]
        print(json.dumps(role(json.loads(Path(sys.argv[2]).read_text()))))
        return 0
    options = _parse()
    options.work.mkdir(parents=True, exist_ok=True)
    python = make_venv(options.work / "autofaiss")
    sets = []
    if options.vectors:
        sets.append(scattered_set(options.work, options.vectors, options.dim))
    if options.book:
        sets.append(picture_book_set(options.work, options.book))
    results = []
    for made in sets:
        lines = measure(made, contenders(made, python, options), options)
        results.append({"set": made.name, "shape": made.vectors.shape, "lines": lines, **judge(lines)})
        if not options.json:
            print_table(results[-1])
    if options.json:
        print(json.dumps({"threads": options.threads, "memory_bytes": options.memory, "results": results}))
    return 0 if all(each["is_faster"] for each in results) else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "for_ray-index-build",
        help="for the venv, the sets and the indexes; kept, so that another run finds venv and sets",
    )
    parser.add_argument("--vectors", type=int, default=1_000_000, help="of the made-up set; 0 for none")
    parser.add_argument("--dim", type=int, default=256, help="of the made-up set (default 256)")
    parser.add_argument("--book", type=int, default=12_500, help="pages of the picture book; 0 for none")
    parser.add_argument("--threads", type=int, default=2, help="for each build (default 2)")
    parser.add_argument(
        "--memory", type=int, default=4 << 30, help="bytes that a build may hold (default 4 GiB)"
    )
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for one build (default 3600)")
    parser.add_argument("--runs", type=int, default=3, help="builds of each that is not long (default 3)")
    parser.add_argument("--theirs", nargs="*", default=THEIRS, choices=THEIRS, help="autofaiss's indexes")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of tables")
    options = parser.parse_args()
    if 0 < options.vectors < FLAT_BELOW or 0 < options.book < FLAT_BELOW // 4:
        parser.error(f"a set wants {FLAT_BELOW:,} vectors or {FLAT_BELOW // 4:,} pages: fewer get no codes")
    return options


def make_venv(folder: Path) -> Path:
    """The Python of a venv that has autofaiss, made unless it is there whole."""
    python = folder / "bin" / "python"
    probe = [str(python), "-c", "import autofaiss"]
    if not python.exists() or subprocess.run(probe, check=False, stderr=subprocess.DEVNULL).returncode:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True, stdout=2)
    return python


def contenders(made: VectorSet, python: Path, options: argparse.Namespace) -> list[Contender]:
    """Ours, then autofaiss's."""
    num_vectors, dim = made.vectors.shape
    plan = plan_index(num_vectors, dim, memory_bytes=options.memory)
    if plan.num_segments > 1:
        raise SystemExit(f"{num_vectors} vectors want {plan.num_segments} segments; give --memory more")
    given = {"memory_bytes": options.memory, "threads": options.threads}
    found = []
    for name, code in OURS.items():
        codec = None if code is None else f"{plan.factory.rpartition(',')[0]},{code}"
        command = [sys.executable, __file__]
        found.append(Contender(f"for_ray, {name}", command, {**given, "codec": codec}, is_ours=True))
    our_bytes = num_vectors * plan.bytes_per_vector + plan.codec_bytes
    free: dict[str, Any] = {"key": None, "key_parameters": None}
    theirs = {
        "its choice": {**free, "index_bytes": int(INDEX_SHARE * options.memory)},
        "our bytes": {**free, "index_bytes": our_bytes},
        BY_HAND: {**_quick_key(plan), "index_bytes": our_bytes},
    }
    for name in options.theirs:
        command = [str(python), str(Path(__file__).with_name("autofaiss_side.py"))]
        found.append(Contender(f"autofaiss, {name}", command, {**given, **theirs[name]}, is_ours=False))
    return found


def _quick_key(plan: IndexPlan) -> dict[str, str]:
    room = plan.bytes_per_vector - ID_BYTES
    num_parts = max(parts for parts in range(1, plan.dim) if plan.dim % parts == 0 and parts <= room)
    return {
        "key": f"Pad{plan.dim},IVF{plan.nlist}_HNSW32,PQ{num_parts}x8",
        "key_parameters": f"nprobe={plan.nprobe},efSearch={2 * plan.nprobe},ht=2048",
    }


def measure(
    made: VectorSet, all_contenders: Sequence[Contender], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A line for each index; after the first round, only what is not long is built again."""
    lines: dict[str, dict[str, Any]] = {}
    for run in range(options.runs):
        for each in all_contenders:
            line = lines.get(each.name)
            if run and (line is None or line.get("seconds", LONG_SECONDS) >= LONG_SECONDS):
                continue
            print(f"{made.name}: {each.name}, run {run + 1} …", file=sys.stderr, flush=True)
            built = _run(made, each, timeout=options.timeout, asks=not run)
            if line is None:
                lines[each.name] = {"index": each.name, "is_ours": each.is_ours, "runs": [built], **built}
            else:
                line["runs"].append(built)
    for line in lines.values():
        done = [built for built in line["runs"] if "seconds" in built]
        if done:
            for name in ("seconds", "cpu_seconds", "peak_mb"):
                line[name] = statistics.median(built[name] for built in done)
        line["runs"] = [built.get("seconds") for built in line["runs"]]
    return list(lines.values())


def _run(made: VectorSet, each: Contender, *, timeout: int, asks: bool) -> dict[str, Any]:
    """Build an index in one process, ask it in another one."""
    with tempfile.TemporaryDirectory(dir=made.folder) as folder:
        index = Path(folder) / "index.faiss"
        options = {
            **each.options,
            "vectors": str(made.path.parent),
            "queries": str(made.folder / "queries.npy"),
            "exact": str(made.folder / "exact.npy"),
            "index": str(index),
            "candidates": num_candidates(RANKED),
        }
        try:
            built = _start(each, "build", options, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"not_done_after": timeout}
        num_bytes = index.stat().st_size
        built |= {"index_bytes": num_bytes, "bytes": num_bytes / len(made.vectors)}
        chosen = {name: built[name] for name in ("codec", "parameters")}
        return {**built, **(_start(each, "ask", {**options, **chosen}) if asks else {})}


def _start(
    each: Contender, role: str, options: dict[str, Any], *, timeout: int | None = None
) -> dict[str, Any]:
    path = Path(options["index"]).with_suffix(".json")
    path.write_text(json.dumps(options))
    threads = options["threads"] if role == "build" else 1
    done = subprocess.run(
        [*each.command, role, str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        check=False,
        timeout=timeout,
    )
    if done.returncode:
        raise SystemExit(f"{each.name}: {role} ends with {done.returncode}: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


# Our side


def build(options: dict[str, Any]) -> dict[str, Any]:
    """Plan, train, add, write, choose `nprobe`; a vector is an image of its own."""
    path = Path(options["vectors"]) / "vectors.npy"
    began = time.perf_counter(), time.process_time()
    num_vectors, dim = np.load(path, mmap_mode="r").shape
    plan = plan_index(num_vectors, dim, codec=options["codec"], memory_bytes=options["memory_bytes"])
    codec_path = Path(options["index"]).with_suffix(".codec")
    codec = train_codec(_sample(path, plan), plan, threads=options["threads"])
    codec_path.write_bytes(codec_to_bytes(codec))
    trained = time.perf_counter()
    build_segment(codec_path, _batches(path), Path(options["index"]), threads=options["threads"])
    added = time.perf_counter()
    nprobe = _tune(path, Path(options["index"]), plan, threads=options["threads"])
    ended = time.perf_counter()
    return {
        "seconds": ended - began[0],
        "cpu_seconds": time.process_time() - began[1],
        "train_seconds": trained - began[0],
        "add_seconds": added - trained,
        "tune_seconds": ended - added,
        "peak_mb": peak_mb(),
        "codec": plan.factory,
        "parameters": f"nprobe={nprobe}",
    }


def _sample(path: Path, plan: IndexPlan) -> NDArray[np.float32]:
    """Rows from all over the file, as many as the plan trains on."""
    wanted = np.linspace(0, plan.num_vectors - 1, plan.training_vectors).astype(np.int64)
    sample = np.empty((len(wanted), plan.dim), np.float32)
    first = taken = 0
    for chunk in read_rows(path):
        rows = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + len(chunk))] - first
        sample[taken : taken + len(rows)] = chunk[rows]
        first, taken = first + len(chunk), taken + len(rows)
    return sample


def _batches(path: Path) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float16]]]:
    first = 0
    for chunk in read_rows(path):
        rows = np.arange(first, first + len(chunk))
        yield pack_vector_ids(rows, np.zeros_like(rows)), chunk
        first += len(chunk)


def _tune(path: Path, index_path: Path, plan: IndexPlan, *, threads: int) -> int:
    """As `stages.verify.measure_recall` does, with vectors of the set: twice the lists until they do."""
    vectors = np.load(path, mmap_mode="r")
    of_set = np.linspace(0, plan.num_vectors - 1, NUM_TUNING).astype(np.int64)
    queries = vectors[of_set].astype(np.float32)
    right = exact_rows(read_rows(path), queries, RANKED)
    index = SegmentSet([index_path], nprobe=plan.nprobe, threads=threads)
    nprobe, before = plan.nprobe, -1.0
    while True:
        search = _search(index, nprobe)
        found = [rerank(search(query, num_candidates(RANKED)), vectors, query, RANKED) for query in queries]
        now = recall(np.stack(found), right)
        if now >= DEFAULT_TARGET_RECALL or nprobe >= plan.nlist or now - before < LEAST_GAIN:
            return min(nprobe, plan.nlist)
        before, nprobe = now, 2 * nprobe


def _search(index: SegmentSet, nprobe: int) -> Search:
    return lambda query, k: image_ids_of(index.search(query[None], k, nprobe=nprobe).vector_ids[0])


def ask(options: dict[str, Any]) -> dict[str, Any]:
    """With the lists that the build chose, then with fewer and more."""
    index = SegmentSet([Path(options["index"])], nprobe=1)
    steps = [int(options["parameters"].removeprefix("nprobe="))]
    steps += [1 << power for power in range(3, index.nlist.bit_length())]
    return asked(((f"nprobe={nprobe}", _search(index, nprobe)) for nprobe in steps), options)


if __name__ == "__main__":
    sys.exit(main())
