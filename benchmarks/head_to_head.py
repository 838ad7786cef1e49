"""SUM-CLIP's head against Cluster-CLIP's, with scikit-learn's k-means and with our own: a table of train.py.

What is compared takes turns, so that what else the machine does hits all; after a turn to warm up, medians,
and of ratios the median of those of each turn. FLOPs are two a multiplication, of matrix products alone,
without k-means; the floor is the time that they take at the rate of a product [1024, 1024] · [1024, 1024] of
the same run.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from for_ray.model import heads
from for_ray.model.backbone import Features, ResNetBackbone
from for_ray.model.heads import ClusterHead, Head
from for_ray.model.kmeans import Clusters, spherical_kmeans
from for_ray.model.pooling import ResNetPooling
from for_ray.model.slot_model import SlotModel
from for_ray.model.sum_clip import SumHead

DIRECTIONS = 30
SIDE, CHANNELS, DIM = 14, 4096, 1024  # RN50x64 at 448 pixels, the paper's backbone
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Figures = dict[str, Any]


class Stopwatch:
    """Adds up the seconds spent in functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on(self, function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        """The function, timed; waits for a GPU before and after."""

        def timed(*values: Parameters.args, **named: Parameters.kwargs) -> Result:
            wait_for_gpu()
            started = time.perf_counter()
            result = function(*values, **named)
            wait_for_gpu()
            self.seconds += time.perf_counter() - started
            return result

        return timed


def wait_for_gpu() -> None:
    """Until it is done, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(parts: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each part in each turn, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(runs + 1):
        for name, part in parts.items():
            watch = Stopwatch()
            watch.on(part)()
            seconds[name] += [watch.seconds] if turn else []
    return seconds


def ratio(over: list[float], under: list[float]) -> float:
    """Median of the turns' ratios."""
    return round(statistics.median(a / b for a, b in zip(over, under, strict=True)), 5)


def random_cells(num_images: int, num_cells: int, width: int) -> Tensor:
    """Vectors [B, K, C] around a few directions an image."""
    generator, shape = torch.Generator().manual_seed(0), (num_images, num_cells, width)
    directions = torch.randn(num_images, DIRECTIONS, width, generator=generator)
    which = torch.randint(DIRECTIONS, shape[:2], generator=generator)[..., None].expand(shape)
    return directions.gather(1, which) + 0.7 * torch.randn(shape, generator=generator)


def random_slots(side: int, width: int, dim: int, num_slots: int) -> SlotModel:
    """SUM-CLIP's head over CLIP's attention pooling, of random weights, on torch's default device."""
    pool = AttentionPool2d(side, width, max(1, width // 64), dim)
    return SlotModel(SumHead(width, num_slots), ResNetPooling(SimpleNamespace(attnpool=pool)))


def sklearn_kmeans(points: Tensor, num_clusters: int, *, seed: int = 0) -> Clusters:
    """What `spherical_kmeans` gives, by scikit-learn: on the CPU, an image after the other."""
    with threadpool_limits(limits=torch.get_num_threads()):
        fits = [
            KMeans(num_clusters, n_init=1, random_state=seed).fit(image) for image in points.cpu().numpy()
        ]
    centres = torch.from_numpy(np.stack([fit.cluster_centers_ for fit in fits]))
    assignment = torch.from_numpy(np.stack([fit.labels_ for fit in fits])).long()
    return Clusters(normalize(centres, dim=-1).to(points.device), assignment.to(points.device))


def count_gflop(call: Callable[[], object]) -> float:
    """Of the matrix products of a call whose tensors are on `meta`: nothing is computed."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops()) / 1e9


def head_gflops(slots: SlotModel, num_cells: int) -> tuple[float, float]:
    """Of one image: Cluster-CLIP's head without its k-means, and SUM-CLIP's."""
    on_meta = copy.deepcopy(slots).to("meta")
    cells = torch.empty(1, num_cells, slots.pooling.width, device="meta")
    features = Features(cells, cells[:, :1], num_cells, 1)
    cluster = count_gflop(lambda: on_meta.pooling.project_cells(features))
    return cluster, count_gflop(lambda: on_meta(features))


def compare_heads(slots: SlotModel, features: Features, *, num_slots: int, runs: int) -> list[Figures]:
    """Milliseconds an image of the three, and the floor of each by its FLOPs."""
    cluster, (num_images, num_cells, width) = ClusterHead(num_slots), features.cells.shape
    slots.eval()

    def run(head: Head, kmeans: Callable[..., Clusters] = spherical_kmeans) -> None:
        with torch.no_grad(), patch.object(heads, "spherical_kmeans", kmeans):
            head(features, slots.pooling)

    square = torch.randn(1024, 1024, device=features.cells.device)
    parts: dict[str, Callable[[], object]] = {
        "SUM-CLIP": lambda: run(slots.head),
        "Cluster-CLIP, our k-means": lambda: run(cluster),
        "Cluster-CLIP, scikit-learn's": lambda: run(cluster, sklearn_kmeans),
        "product": lambda: square @ square,
    }
    seconds = take_turns(parts, runs)
    rate = 2 * 1.024**3 / statistics.median(seconds.pop("product"))  # GFLOP/s
    gflop, shape = (
        head_gflops(slots, num_cells),
        f"[{num_images}, {num_cells}, {width}] → {slots.pooling.dim}",
    )
    return [
        {
            "shape": shape,
            "head": name,
            "ms": round(1e3 * statistics.median(each) / num_images, 3),
            "gflop": round(gflop[name == "SUM-CLIP"], 3),
            "floor_ms": round(1e3 * gflop[name == "SUM-CLIP"] / rate, 3),
            "times_sum": round(ratio(each, seconds["SUM-CLIP"]), 2),
        }
        for name, each in seconds.items()
    ]


def at_papers_size(matching_seconds: float, runs: int) -> dict[str, float]:
    """RN50x64: FLOPs counted, k-means of its dense embeddings measured, and what follows from the two."""
    with torch.device("meta"):
        tower = ModifiedResNet((3, 15, 36, 10), output_dim=DIM, heads=64, image_size=32 * SIDE, width=128)
        slots, pixels = random_slots(SIDE, CHANNELS, DIM, 50), torch.empty(1, 3, 32 * SIDE, 32 * SIDE)
    (cluster, sums), backbone = (
        head_gflops(slots, SIDE**2),
        count_gflop(lambda: ResNetBackbone(tower)(pixels)),
    )
    points = normalize(random_cells(8, SIDE**2, DIM), dim=-1)
    seconds = statistics.median(take_turns({"fit": lambda: sklearn_kmeans(points, 50)}, runs)["fit"]) / 8
    figures = {
        "GFLOP an image: backbone": backbone,
        "GFLOP an image: SUM-CLIP's head": sums,
        "GFLOP an image: Cluster-CLIP's head without k-means": cluster,
        "ms an image: scikit-learn's k-means, measured": 1e3 * seconds,
        "an epoch from images over one from features, by FLOPs": (backbone + 3 * sums) / (3 * sums),
        "TFLOP/s from which SUM-CLIP's head is ahead of scikit-learn's": (sums - cluster) / seconds / 1e3,
        "TFLOP/s from which its whole inference is three times as fast": (
            (3 * (backbone + sums) - backbone - cluster) / seconds / 1e3
        ),
        "TFLOP/s up to which matching as above is under 10 % of a step": 64 * sums / (3e3 * matching_seconds),
    }
    return {name: round(value, 2) for name, value in figures.items()}
