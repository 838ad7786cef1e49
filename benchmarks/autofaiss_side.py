"""autofaiss's side of `index_build.py`, and how both sides are asked.

    python benchmarks/autofaiss_side.py build OPTIONS.json     # builds, and says what it took
    python benchmarks/autofaiss_side.py ask OPTIONS.json       # asks what was built

Run by the Python of a venv that has autofaiss, and not this package. Options and the last line of the output
are JSON.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Search = Callable[[NDArray[np.float32], int], NDArray[np.int64]]
"""The rows [k] of the k best vectors for a query [D], by their codes; -1 where there are fewer."""

MOST_RECALL = 0.9999
"""A search that finds so much is not asked to look at more."""

LEAST_GAIN = 0.0005
"""Of recall, by looking at twice as much: with less, it is the codes that hold it back."""


def build(options: dict[str, Any]) -> dict[str, Any]:
    """`autofaiss.build_index`, as its users call it: read, choose, train, add, tune, write."""
    autofaiss = importlib.import_module("autofaiss")
    # Whole KB: its parser takes numbers with a unit.
    most, budget = (f"{options[name] // 1024}KB" for name in ("index_bytes", "memory_bytes"))
    began = time.perf_counter(), time.process_time()
    index, found = autofaiss.build_index(
        options["vectors"],
        index_path=options["index"],
        index_infos_path=options["index"] + ".json",
        index_key=options["key"],
        index_param=options["key_parameters"],
        max_index_memory_usage=most,
        current_memory_available=budget,
        nb_cores=options["threads"],
        metric_type="ip",
    )
    seconds, cpu_seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    if index is None or found is None:
        raise SystemExit(f"autofaiss builds nothing of {options['vectors']} with {most} of {budget}")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": peak_mb(),
        "codec": found["index_key"],
        "parameters": found["index_param"],
        "versions": {name: version(name) for name in ("autofaiss", "faiss-cpu", "numpy")},
    }


def ask(options: dict[str, Any]) -> dict[str, Any]:
    """With the parameters that autofaiss chose, then with less and more."""
    faiss = importlib.import_module("faiss")
    index = faiss.read_index(options["index"])
    faiss.omp_set_num_threads(1)

    def search(query: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        rows: NDArray[np.int64] = index.search(query[None], k)[1][0]
        return rows

    def points() -> Iterator[tuple[str, Search]]:
        for parameters in [options["parameters"], *_ladder(options["codec"])]:
            faiss.ParameterSpace().set_index_parameters(index, parameters)
            yield parameters, search

    return asked(points(), options)


def _ladder(key: str) -> list[str]:
    """Parameters in the form that autofaiss gives them, each for twice as much as the one before."""
    lists = re.search(r"IVF(\d+)", key)
    if lists is None:
        return [f"efSearch={1 << power}" for power in range(6, 14)]
    steps = [1 << power for power in range(3, int(lists[1]).bit_length())]
    if "_HNSW" not in key:
        return [f"nprobe={nprobe}" for nprobe in steps]
    return [f"nprobe={nprobe},efSearch={2 * nprobe},ht=2048" for nprobe in steps]


def asked(points: Iterator[tuple[str, Search]], options: dict[str, Any]) -> dict[str, Any]:
    """Recall and time of a query on one thread: of the first point, and of the points after it.

    Args:
        points: What is set, and the search with it: first what the build chose, then from few lists to all.
        options: Paths of `vectors`, `queries` and `exact`; `candidates`, which the re-rank compares.

    Returns:
        `chosen`, a point, and `curve`, points up to where looking at more finds no more.
    """
    vectors = np.load(Path(options["vectors"]) / "vectors.npy", mmap_mode="r")
    queries, exact = np.load(options["queries"]), np.load(options["exact"])
    asked_at: list[dict[str, Any]] = []
    for parameters, search in points:
        point: dict[str, Any] = {"parameters": parameters}
        point |= _measured(search, vectors, queries, exact, options["candidates"])
        asked_at.append(point)
        found = [each["recall_reranked"] for each in asked_at[1:]]
        if found and (found[-1] >= MOST_RECALL or (len(found) > 1 and found[-1] - found[-2] < LEAST_GAIN)):
            break
    return {"chosen": asked_at[0], "curve": asked_at[1:]}


def _measured(
    search: Search,
    vectors: NDArray[np.float16],
    queries: NDArray[np.float32],
    exact: NDArray[np.int64],
    candidates: int,
) -> dict[str, float]:
    """Medians over the queries, one at a time; those of a first round do not count."""
    ranked = exact.shape[1]

    def reranked(query: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        return rerank(search(query, candidates), vectors, query, k)

    point: dict[str, float] = {}
    for suffix, way in (("", search), ("_reranked", reranked)):
        for query in queries[: len(queries) // 5]:
            way(query, ranked)
        seconds, shares = [], []
        for query, right in zip(queries, exact, strict=True):
            began = time.perf_counter()
            rows = way(query, ranked)
            seconds.append(time.perf_counter() - began)
            shares.append(np.isin(right[right >= 0], rows).mean())
        point[f"recall{suffix}"] = float(np.mean(shares))
        point[f"p50_ms{suffix}"] = 1e3 * float(np.median(seconds))
    return point


def rerank(
    rows: NDArray[np.int64], vectors: NDArray[np.float16], query: NDArray[np.float32], k: int
) -> NDArray[np.int64]:
    """The k of these rows with the highest exact cosines."""
    rows = np.sort(rows[rows >= 0])  # in the order in which they lie on disk
    scores = vectors[rows].astype(np.float32) @ query
    return rows[np.argsort(-scores, kind="stable")[:k]]


def peak_mb() -> float:
    """The most memory that this process has had: the kernel's VmHWM."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else float("nan")


if __name__ == "__main__":
    role = {"build": build, "ask": ask}[sys.argv[1]]
    print(json.dumps(role(json.loads(Path(sys.argv[2]).read_text()))))
