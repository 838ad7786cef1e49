"""The heads that need no training: `clip`, `dense` and `cluster`. `sum` is in `sum_clip`.

Source: FOR, §3.1, eq. 1 and 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from for_ray.model.backbone import Features
from for_ray.model.boxes import attention_boxes, cell_boxes, cluster_boxes
from for_ray.model.kmeans import spherical_kmeans
from for_ray.model.pooling import Pooling


class HeadOutput(NamedTuple):
    """vectors [B, N, D], float32, unit length; boxes [B, N, 4], float32, fractions of the model's input."""

    vectors: Tensor
    boxes: Tensor


class Head(nn.Module):
    """Turns features into slots; the frozen pooling layer is handed in, no part of the head's weights."""

    def forward(self, features: Features, pooling: Pooling) -> HeadOutput:
        """Slots of B images; of those that say the same the first is stored."""
        raise NotImplementedError


class ClipHead(Head):
    """CLIP's own embedding, one an image (eq. 1); equals open_clip's `encode_image`, normalised."""

    def forward(self, features: Features, pooling: Pooling) -> HeadOutput:
        """One slot an image; its box is what CLIP's pooling attends to most."""
        pooled = pooling.attend(pooling.default_slot(features), features, with_prefix=True)
        boxes = attention_boxes(pooled.attention, features.height, features.width)
        return HeadOutput(functional.normalize(pooled.embeddings.float(), dim=-1), boxes)


class DenseHead(Head):
    """Every cell on its own (eq. 2).

    Args:
        with_positions: Add the pooling layer's positions to a ModifiedResNet's cells. CLIP adds them to its
            values, Dense-CLIP doesn't; which one finds more depends on the checkpoint.
    """

    def __init__(self, *, with_positions: bool = False) -> None:
        super().__init__()
        self.with_positions = with_positions

    def forward(self, features: Features, pooling: Pooling) -> HeadOutput:
        """K slots an image, row by row; a slot's box is its cell."""
        vectors = pooling.project_cells(features, with_positions=self.with_positions)
        boxes = cell_boxes(features.height, features.width, vectors.device)
        return HeadOutput(functional.normalize(vectors.float(), dim=-1), boxes.expand(len(vectors), -1, -1))


class ClusterHead(Head):
    """Cluster-CLIP: the mean of each cluster of the dense embeddings.

    Args:
        num_slots: N; an image of fewer cells gives one slot a cell.
        with_positions: As in `DenseHead`.
        seed: Of k-means++.
    """

    def __init__(self, num_slots: int, *, with_positions: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.with_positions = with_positions
        self.seed = seed

    def forward(self, features: Features, pooling: Pooling) -> HeadOutput:
        """N slots an image, the largest cluster first; a slot's box is its cluster's largest piece."""
        cells = pooling.project_cells(features, with_positions=self.with_positions)
        cells = functional.normalize(cells.float(), dim=-1)
        num_slots = min(self.num_slots, cells.shape[1])
        centres, assignment = spherical_kmeans(cells, num_slots, seed=self.seed)
        boxes = cluster_boxes(assignment, num_slots, features.height, features.width)
        sizes = torch.zeros_like(assignment[:, :num_slots]).scatter_add_(
            1, assignment, torch.ones_like(assignment)
        )
        order = sizes.argsort(dim=1, descending=True, stable=True)[..., None]  # [B, N, 1]
        return HeadOutput(torch.take_along_dim(centres, order, 1), torch.take_along_dim(boxes, order, 1))
