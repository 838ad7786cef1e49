"""SUM-CLIP: learnable slots that look at the image before they pool it.

Source: FOR, §3.1 and eq. 3; the decoder is DETR's (post-norm), whose target starts as the slots themselves,
so that without layers the slots reach the pooling layer unchanged (Table 7).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from for_ray.model.backbone import Features
from for_ray.model.boxes import attention_boxes
from for_ray.model.heads import Head, HeadOutput
from for_ray.model.pooling import Pooling

_HEAD_WIDTH = 64
"""Channels of one attention head of the decoder (method.md: heads = C / 64)."""


class DecoderLayer(nn.Module):
    """One of DETR's decoder layers, post-norm, with ReLU.

    Args:
        width: C.
        feedforward_width: Of the hidden layer.
        dropout: After each of the three parts, and inside attention and feed-forward.
    """

    def __init__(self, width: int, feedforward_width: int, *, dropout: float) -> None:
        super().__init__()
        num_heads = max(1, width // _HEAD_WIDTH)
        self.self_attention = nn.MultiheadAttention(width, num_heads, dropout=dropout, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(width, num_heads, dropout=dropout, batch_first=True)
        self.expand = nn.Linear(width, feedforward_width)
        self.contract = nn.Linear(feedforward_width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, target: Tensor, slots: Tensor, cells: Tensor, keys: Tensor) -> Tensor:
        """Refine the target.

        Args:
            target: [B, N, C].
            slots: Added to the target wherever it asks, as DETR adds its query embedding [B, N, C].
            cells: Values of the cross-attention [B, K, C].
            keys: Cells with their positions [B, K, C].

        Returns:
            [B, N, C].
        """
        asking = target + slots
        update = self.self_attention(asking, asking, target, need_weights=False)[0]
        target = self.norms[0](target + self.dropout(update))
        update = self.cross_attention(target + slots, keys, cells, need_weights=False)[0]
        target = self.norms[1](target + self.dropout(update))
        update = self.contract(self.dropout(functional.relu(self.expand(target))))
        refined: Tensor = self.norms[2](target + self.dropout(update))
        return refined


class SumHead(Head):
    """N learnable slots, L decoder layers, then CLIP's pooling attention (eq. 3).

    Weights are fresh (Xavier uniform) until a bundle's `head.safetensors` is loaded.

    Args:
        width: C, size of cells and slots.
        num_slots: N.
        num_layers: L; 0 hands the slots to the pooling layer as they are.
        feedforward_width: Of the decoder layers.
        dropout: Of the decoder layers, in training.
        with_prefix: The mean token (of ViTs: the class token) is among the keys of the pooling layer.
    """

    def __init__(
        self,
        width: int,
        num_slots: int,
        *,
        num_layers: int = 2,
        feedforward_width: int = 2048,
        dropout: float = 0.1,
        with_prefix: bool = False,
    ) -> None:
        super().__init__()
        self.slots = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_slots, width)))
        self.layers = nn.ModuleList(
            DecoderLayer(width, feedforward_width, dropout=dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width) if num_layers else nn.Identity()
        self.with_prefix = with_prefix
        for parameter in self.layers.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def refine_slots(self, features: Features, pooling: Pooling) -> Tensor:
        """Q̃ = F(Q, X): the slots, made ready for these images [B, N, C]."""
        slots = self.slots.to(features.cells.dtype).expand(len(features.cells), -1, -1)
        positions = pooling.positions()
        keys = features.cells if positions is None else features.cells + positions.to(features.cells.dtype)
        target = slots
        for layer in self.layers:
            target = layer(target, slots, features.cells, keys)
        normed: Tensor = self.norm(target)
        return normed

    def forward(self, features: Features, pooling: Pooling) -> HeadOutput:
        """N embeddings an image, boxes from the pooling attention."""
        pooled = pooling.attend(self.refine_slots(features, pooling), features, with_prefix=self.with_prefix)
        boxes = attention_boxes(pooled.attention, features.height, features.width)
        return HeadOutput(functional.normalize(pooled.embeddings.float(), dim=-1), boxes)
