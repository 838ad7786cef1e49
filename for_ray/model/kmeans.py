"""Spherical k-means of many small sets at once, for Cluster-CLIP.

Source: FOR, §3.1 (Cluster-CLIP); k-means++ with greedy trials as scikit-learn draws it.

With G = X Xᵀ the whole algorithm needs no vector any more: the cosine of cell i with the centre of cluster j
is Σ_{l∈j} G[i, l] divided by the length of the sum, itself a sum over G. So one product [K, D]·[D, K] an
image, and every iteration costs K·K·N instead of 2·K·N·D multiplications (K 196, D 1024: a tenth).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_EPSILON = 1e-12


class Clusters(NamedTuple):
    """Clusters of B sets.

    centres: mean of each cluster's points, l2-normalised [B, N, D], float32.
    assignment: the cluster of each point [B, K], int64; every cluster has at least one.
    """

    centres: Tensor
    assignment: Tensor


def spherical_kmeans(
    points: Tensor, num_clusters: int, *, seed: int = 0, max_iterations: int = 50
) -> Clusters:
    """Cluster each image's unit vectors by cosine.

    Each image gets the same random numbers, so its clusters don't depend on what else is in the batch.
    A cluster that loses its points takes the point farthest from its own centre. On a GPU the number of
    iterations is fixed (no value comes back to the host); on a CPU it ends when nothing changes any more,
    with the same result: an assignment that maps to itself stays.

    Args:
        points: Unit vectors [B, K, D], floating point; computed in float32.
        num_clusters: N, at least 1 and at most K.
        seed: Of the k-means++ draws.
        max_iterations: Assignments after the first.

    Raises:
        ValueError: The shape is wrong, or N is outside 1..K.
    """
    if points.ndim != 3 or not 1 <= num_clusters <= points.shape[1]:
        raise ValueError(f"points must be [B, K, D] with 1 <= {num_clusters} <= K, got {list(points.shape)}")
    with torch.autocast(points.device.type, enabled=False):
        points = points.float()
        gram = torch.bmm(points, points.transpose(1, 2))  # [B, K, D] -> [B, K, K]
        gram.diagonal(dim1=1, dim2=2).fill_(1.0)  # a point's distance to itself is exactly nothing
        assignment = _lloyd(gram, _seeded(gram, num_clusters, seed), num_clusters, max_iterations)
        members = _members(assignment, num_clusters)
        sums = torch.bmm(members.transpose(1, 2), points)  # [B, N, K] x [B, K, D] -> [B, N, D]
        return Clusters(functional.normalize(sums, dim=-1), assignment)


def _lloyd(gram: Tensor, assignment: Tensor, num_clusters: int, max_iterations: int) -> Tensor:
    may_stop_early = gram.device.type == "cpu"
    for _ in range(max_iterations):
        cosines = _cosines_to_centres(gram, assignment, num_clusters)
        updated = _fill_empty(*cosines.max(dim=-1), num_clusters)
        is_settled = may_stop_early and torch.equal(updated, assignment)
        assignment = updated
        if is_settled:
            break
    return assignment


def _cosines_to_centres(gram: Tensor, assignment: Tensor, num_clusters: int) -> Tensor:
    """Cosine of every point with every centre [B, K, N]; the centres are never formed."""
    to_sums = torch.bmm(gram, _members(assignment, num_clusters))  # [B, K, K] x [B, K, N] -> [B, K, N]
    own = to_sums.gather(2, assignment[..., None])[..., 0]
    lengths = torch.zeros_like(to_sums[:, 0]).scatter_add_(1, assignment, own)  # squared, [B, N]
    return to_sums.mul_(lengths.clamp_min(_EPSILON).rsqrt()[:, None])


def _members(assignment: Tensor, num_clusters: int) -> Tensor:
    """1 where a point belongs to a cluster, else 0: [B, K] -> [B, K, N] float32."""
    members = torch.zeros(*assignment.shape, num_clusters, device=assignment.device)
    return members.scatter_(2, assignment[..., None], 1.0)


def _seeded(gram: Tensor, num_clusters: int, seed: int) -> Tensor:
    """First assignment [B, K], by greedy k-means++: of a few drawn points the one that helps most.

    The loop over clusters is the algorithm: each draw depends on the one before.
    """
    num_points = gram.shape[1]
    num_trials = 2 + int(math.log(num_clusters))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(num_clusters, num_trials, generator=generator).to(gram.device, non_blocking=True)
    chosen = (draws[0, :1] * num_points).long().expand(len(gram), 1)  # [B, 1]
    best = _rows(gram, chosen)[:, 0]  # cosine of each point with the nearest seed [B, K]
    assignment = torch.zeros_like(best, dtype=torch.long)
    for cluster in range(1, num_clusters):
        distances = (1.0 - best).clamp_min_(0.0).cumsum(dim=1)
        targets = (draws[cluster] * distances[:, -1:]).contiguous()  # [B, trials]
        drawn = torch.searchsorted(distances, targets, right=True).clamp_max_(num_points - 1)
        rows = torch.maximum(_rows(gram, drawn), best[:, None])  # [B, trials, K]
        winner = rows.sum(dim=2).argmax(dim=1)
        nearer = rows.gather(1, winner[:, None, None].expand(-1, 1, num_points))[:, 0]
        assignment.masked_fill_(nearer > best, cluster)
        best = nearer
    return assignment


def _rows(gram: Tensor, indices: Tensor) -> Tensor:
    """Rows of each image's Gram matrix: [B, K, K], [B, m] -> [B, m, K]."""
    return gram.gather(1, indices[..., None].expand(-1, -1, gram.shape[2]))


def _fill_empty(cosines: Tensor, assignment: Tensor, num_clusters: int) -> Tensor:
    """Give each cluster without points one of the points that lie farthest from their centres.

    One point of every cluster, its nearest, never leaves: so there are always enough to give away, and no
    cluster is emptied by giving.

    Args:
        cosines: Of each point with its own centre [B, K].
        assignment: [B, K].
        num_clusters: N.
    """
    batch, num_points = assignment.shape
    minus = torch.full((batch, num_clusters), -torch.inf, device=cosines.device)
    nearest = minus.scatter_reduce(1, assignment, cosines, "amax")  # [B, N]
    index = torch.arange(num_points, device=assignment.device).expand(batch, -1)
    is_nearest = cosines >= nearest.gather(1, assignment)
    leaders = torch.full((batch, num_clusters), num_points, device=assignment.device)
    leaders = leaders.scatter_reduce(1, assignment, torch.where(is_nearest, index, num_points), "amin")
    is_empty = leaders == num_points
    may_move = index != leaders.gather(1, assignment)
    farthest = torch.where(may_move, cosines, torch.inf).argsort(dim=1, stable=True)  # [B, K]
    rank = (is_empty.cumsum(dim=1) - 1).clamp_min_(0)
    takes = farthest.gather(1, rank)  # the point that each empty cluster takes [B, N]
    # One column more than there are points swallows the writes of clusters that aren't empty.
    padded = functional.pad(assignment, (0, 1))
    clusters = torch.arange(num_clusters, device=assignment.device).expand(batch, -1)
    padded = padded.scatter(1, torch.where(is_empty, takes, num_points), clusters)
    return padded[:, :num_points]
