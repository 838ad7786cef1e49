"""Where in the image a slot looks, and which slots of one image say the same. All batched, no host sync.

Boxes are x0, y0, x1, y1 as fractions of the model's input. A slot's cells can lie in several places (two
dogs, a stray cell of the background): the box is that of one connected piece, so that it shows an object
instead of everything in between.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from for_ray.model.encoder_config import KeepRule

SHARE_OF_PEAK = 0.5
"""A cell belongs to what a slot attends to from this share of the slot's largest weight on."""

_ROUNDS = 8
"""Of `distinct_slots`; exact as long as no chain of duplicates is longer."""


def cell_boxes(height: int, width: int, device: torch.device) -> Tensor:
    """The box of every cell of a grid, row by row [height · width, 4]."""
    top, left = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    corners = torch.stack([left / width, top / height, (left + 1) / width, (top + 1) / height], dim=-1)
    return corners.reshape(-1, 4)


def cluster_boxes(assignment: Tensor, num_clusters: int, height: int, width: int) -> Tensor:
    """The box of each cluster's largest connected piece (4 neighbours); of equals the lowest.

    Args:
        assignment: Cluster of each cell [B, K], K = height · width; each cluster has a cell.
        num_clusters: N.
        height: Of the grid, in cells; `width` likewise.
        width: See `height`.

    Returns:
        [B, N, 4], float32.
    """
    pieces = connected_pieces(assignment.view(-1, height, width)).flatten(1)  # [B, K]
    sizes = torch.zeros_like(pieces).scatter_add_(1, pieces, torch.ones_like(pieces))
    rank = sizes.gather(1, pieces) * pieces.shape[1] + pieces  # size first, then position: unique to a piece
    largest = torch.full((len(pieces), num_clusters), -1, dtype=rank.dtype, device=rank.device)
    largest = largest.scatter_reduce(1, assignment, rank, "amax")
    is_in = rank == largest.gather(1, assignment)
    # Cells outside of their cluster's largest piece fall into one more cluster, which is dropped.
    home = torch.where(is_in, assignment, num_clusters)[..., None].expand(-1, -1, 4)
    corners = cell_boxes(height, width, assignment.device).expand(len(assignment), -1, -1)  # [B, K, 4]
    shape = (len(assignment), num_clusters + 1, 4)
    low = torch.ones(shape, device=corners.device).scatter_reduce(1, home, corners, "amin")
    high = torch.zeros(shape, device=corners.device).scatter_reduce(1, home, corners, "amax")
    return torch.cat([low[:, :-1, :2], high[:, :-1, 2:]], dim=-1)


def attention_boxes(attention: Tensor, height: int, width: int) -> Tensor:
    """The box of the piece around each slot's peak: connected cells of at least half the largest weight.

    Args:
        attention: Weight of each cell for each slot [B, N, K], not negative; K = height · width.
        height: Of the grid, in cells; `width` likewise.
        width: See `height`.

    Returns:
        [B, N, 4], float32.
    """
    batch, num_slots, num_cells = attention.shape
    flat = attention.float().reshape(-1, num_cells)  # [B·N, K]
    largest, peak = flat.max(dim=1, keepdim=True)
    is_bright = flat >= SHARE_OF_PEAK * largest
    pieces = connected_pieces(is_bright.long().view(-1, height, width)).flatten(1)
    is_in = (is_bright & (pieces == pieces.gather(1, peak)))[..., None]  # [B·N, K, 1]
    corners = cell_boxes(height, width, attention.device)
    low = torch.where(is_in, corners[:, :2], 1.0).amin(dim=1)
    high = torch.where(is_in, corners[:, 2:], 0.0).amax(dim=1)
    return torch.cat([low, high], dim=-1).view(batch, num_slots, 4)


def connected_pieces(groups: Tensor) -> Tensor:
    """Label the 4-connected pieces of equal values [M, h, w] int64 with one cell index of each, the largest.

    Every round takes the largest label among equal neighbours, then jumps to that cell's own label; jumps
    double in length, so that the logarithm of the number of cells suffices. A spiral longer than the rounds
    reach would stay in two pieces.
    """
    height, width = groups.shape[1:]
    num_cells = height * width
    labels = torch.arange(num_cells, device=groups.device).view(1, height, width).expand_as(groups)
    beside = groups[:, :, 1:] == groups[:, :, :-1]
    below = groups[:, 1:] == groups[:, :-1]
    for _ in range(2 * math.ceil(math.log2(max(num_cells, 2))) + 2):
        across = torch.where(beside, torch.maximum(labels[:, :, 1:], labels[:, :, :-1]), -1)
        labels = torch.maximum(
            labels,
            torch.maximum(functional.pad(across, (0, 1), value=-1), functional.pad(across, (1, 0), value=-1)),
        )
        down = torch.where(below, torch.maximum(labels[:, 1:], labels[:, :-1]), -1)
        down = torch.maximum(
            functional.pad(down, (0, 0, 0, 1), value=-1), functional.pad(down, (0, 0, 1, 0), value=-1)
        )
        flat = torch.maximum(labels, down).flatten(1)
        labels = flat.gather(1, flat).view_as(groups)
    return labels


def distinct_slots(vectors: Tensor, threshold: float) -> Tensor:
    """Which slots to keep: those without an earlier kept slot of the same image above `threshold`.

    The greedy rule, solved by rounds instead of a loop over slots: after r rounds it is exact for every slot
    whose chain of duplicates has at most r links. The number of rounds is even, and after an even number
    what is undecided is kept: a duplicate may survive, a distinct slot is never lost.

    Args:
        vectors: Unit vectors [B, N, D]; earlier slots are preferred.
        threshold: Cosine; from 1 on everything is kept.

    Returns:
        [B, N], bool; the first slot is always kept.
    """
    if threshold >= 1.0:
        return torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
    cosines = torch.bmm(vectors, vectors.transpose(1, 2))  # [B, N, D] -> [B, N, N]
    is_like_earlier = (cosines > threshold).tril(-1).to(vectors.dtype)
    keep = torch.ones(*vectors.shape[:2], 1, dtype=vectors.dtype, device=vectors.device)
    for _ in range(_ROUNDS):
        keep = (torch.bmm(is_like_earlier, keep) < 0.5).to(vectors.dtype)
    return keep[..., 0] > 0.5


def apart_slots(vectors: Tensor, threshold: float) -> Tensor:
    """Which slots to keep: those whose cosine with the mean of their image's slots is at most `threshold`.

    Learnt slots that find nothing of their own look at the whole image, and crowd around that mean.

    Args:
        vectors: Unit vectors [B, N, D]; what is not finite is no part of the mean, and not kept.
        threshold: Cosine; from 1 on everything is kept.

    Returns:
        [B, N], bool; the slot least like the mean is always kept.
    """
    if threshold >= 1.0:
        return torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
    mean = functional.normalize(vectors.nan_to_num(0.0, 0.0, 0.0).mean(dim=1, keepdim=True), dim=-1)
    cosines = (vectors * mean).sum(dim=-1).nan_to_num(torch.inf, torch.inf, torch.inf)
    return (cosines <= threshold).scatter(1, cosines.argmin(dim=1, keepdim=True), True)


def kept_slots(vectors: Tensor, threshold: float, rule: KeepRule) -> Tensor:
    """Which slots to keep [B, N], bool, by `distinct_slots` or `apart_slots`."""
    return {"distinct": distinct_slots, "apart": apart_slots}[rule](vectors, threshold)
