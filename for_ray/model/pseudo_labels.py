"""Pseudo-labels: what Cluster-CLIP believes an image shows, out of a large vocabulary (FOR, §3.2, eq. 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MOST_LOGITS = 1 << 26
"""Similarities that are held at once: 256 MB in float32."""


class PseudoLabels(NamedTuple):
    """Labels of B images, the most probable first.

    labels: indices into the vocabulary [B, T], int64; -1 where there is none.
    probabilities: softmax over the vocabulary, maximum over the slots [B, T], float32; 0 where there is none.
    """

    labels: Tensor
    probabilities: Tensor


def category_probabilities(vectors: Tensor, text: Tensor, *, logit_scale: float) -> Tensor:
    """Per image and category: softmax over the categories in each slot, then the maximum over the slots.

    The logit scale is CLIP's own: over 21,843 categories a softmax of bare cosines cannot exceed 3.4e-4.

    Args:
        vectors: Unit vectors [B, N, D].
        text: Unit vectors of the vocabulary [V, D], on the same device.
        logit_scale: What cosines are multiplied with.

    Returns:
        [B, V], float32.

    Raises:
        ValueError: The shapes do not go together.
    """
    if vectors.ndim != 3 or text.ndim != 2 or vectors.shape[2] != text.shape[1]:
        raise ValueError(f"expected [B, N, D] and [V, D], got {list(vectors.shape)} and {list(text.shape)}")
    images_at_once = max(1, MOST_LOGITS // max(1, vectors.shape[1] * len(text)))
    parts = []
    for part in torch.split(vectors.float(), images_at_once):
        logits = logit_scale * (part @ text.float().T)  # [b, N, D] -> [b, N, V]
        logits -= logits.logsumexp(dim=2, keepdim=True)
        parts.append(logits.amax(dim=1).exp())  # [b, N, V] -> [b, V]
    return torch.cat(parts) if parts else vectors.new_zeros((0, len(text)), dtype=torch.float32)


def label_images(
    vectors: Tensor,
    text: Tensor,
    *,
    logit_scale: float,
    threshold: float,
    most: int,
) -> PseudoLabels:
    """The categories whose probability is above the threshold; nothing waits for the device.

    Args:
        vectors: See `category_probabilities`.
        text: See `category_probabilities`.
        logit_scale: See `category_probabilities`.
        threshold: Labels are above it.
        most: Labels of an image at most, at least 1; T is this or V, whichever is less.

    Raises:
        ValueError: The shapes do not go together, or `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"an image must be allowed 1 label at least, got {most}")
    probabilities = category_probabilities(vectors, text, logit_scale=logit_scale)
    probabilities = torch.where(probabilities > threshold, probabilities, 0.0)
    best, labels = probabilities.topk(min(most, len(text)), dim=1)
    return PseudoLabels(torch.where(best > 0, labels, -1), best)
