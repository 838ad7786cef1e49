"""Our batched spherical k-means against scikit-learn's KMeans, image by image, on the same unit vectors.

    python benchmarks/kmeans.py [--images 64] [--cells 196] [--dim 1024] [--clusters 50] [--runs 5]

Two kinds of vectors: `objects`, where the cells of an image scatter around 30 directions, as dense embeddings
do; and `noise`, without any structure. Inertia is the sum of squared distances to the mean of each point's
cluster, for both, from the assignments alone. Both use torch's number of threads; runs alternate, so that
what else the machine does hits both; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from for_ray.model.kmeans import spherical_kmeans

_DIRECTIONS = 30


def make_points(kind: str, num_images: int, num_cells: int, dim: int, *, seed: int = 0) -> Tensor:
    """Unit vectors [B, K, D] of the kind `objects` or `noise`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_images, num_cells, dim, generator=generator)
    if kind == "noise":
        return normalize(noise, dim=-1)
    directions = torch.randn(num_images, _DIRECTIONS, dim, generator=generator)
    which = torch.randint(_DIRECTIONS, (num_images, num_cells), generator=generator)
    return normalize(directions.gather(1, which[..., None].expand(-1, -1, dim)) + 0.7 * noise, dim=-1)


def inertia(points: Tensor, assignment: Tensor, num_clusters: int) -> float:
    """Sum of squared distances to the means of the clusters, over all images."""
    members = one_hot(assignment, num_clusters).float()  # [B, K, N]
    sums = members.transpose(1, 2) @ points
    counts = members.sum(dim=1).clamp_min(1.0)
    return float(points.square().sum() - (sums.square().sum(dim=-1) / counts).sum())


def ours(points: Tensor, num_clusters: int) -> Tensor:
    """Assignments [B, K] by this package."""
    return spherical_kmeans(points, num_clusters).assignment


def theirs(points: Tensor, num_clusters: int) -> Tensor:
    """Assignments [B, K] by scikit-learn, one fit an image."""
    images: NDArray[np.float32] = points.numpy()
    with threadpool_limits(limits=torch.get_num_threads()):
        labels = [KMeans(num_clusters, n_init=1, random_state=0).fit(image).labels_ for image in images]
    return torch.from_numpy(np.stack(labels)).long()


def timed(
    cluster: Callable[[Tensor, int], Tensor], points: Tensor, num_clusters: int
) -> tuple[float, Tensor]:
    """Seconds of one run, and its assignments."""
    start = time.perf_counter()
    assignment = cluster(points, num_clusters)
    return time.perf_counter() - start, assignment


def compare(kind: str, options: argparse.Namespace) -> dict[str, float | str]:
    """Medians over the runs, after one run of each to warm up."""
    points = make_points(kind, options.images, options.cells, options.dim)
    ours(points[:8], options.clusters), theirs(points[:1], options.clusters)
    seconds: dict[str, list[float]] = {"ours": [], "sklearn": []}
    inertias = {}
    for _ in range(options.runs):
        for name, cluster in (("ours", ours), ("sklearn", theirs)):
            elapsed, assignment = timed(cluster, points, options.clusters)
            seconds[name].append(elapsed)
            inertias[name] = inertia(points, assignment, options.clusters)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "vectors": kind,
        "ours_seconds": round(medians["ours"], 4),
        "sklearn_seconds": round(medians["sklearn"], 4),
        "times_faster": round(medians["sklearn"] / medians["ours"], 2),
        "inertia_ratio": round(inertias["ours"] / inertias["sklearn"], 4),
    }


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("images", 64), ("cells", 196), ("dim", 1024), ("clusters", 50), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    results = [compare(kind, options) for kind in ("objects", "noise")]
    shape = f"[{options.images}, {options.cells}, {options.dim}], {options.clusters} clusters"
    print(f"k-means of {shape}, {torch.get_num_threads()} threads, median of {options.runs} runs")
    for result in results:
        print(
            f"  {result['vectors']:8} ours {result['ours_seconds']:.3f} s, scikit-learn "
            f"{result['sklearn_seconds']:.3f} s: {result['times_faster']:.1f} times faster, "
            f"inertia {result['inertia_ratio']:.4f} of scikit-learn's"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
