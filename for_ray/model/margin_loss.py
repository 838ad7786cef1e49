"""The losses of the second paper: margins on angles, and the re-alignment of a text tower.

    ArcMargin      one class an image; the proxies of the classes are learnt
    MCArcMargin    several captions an image; the proxies are the captions of the batch
    InfoNCE        image-caption pairs (Re-A)

Source: MCIP (arXiv 2409.01936), §3.2 and §3.3; ArcFace for the margin. All of them give one value an image,
so that many workers can divide the sum by the weight of the global batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

SCALE = 30.0
"""s, what cosines are multiplied with before the softmax."""

MARGIN = 0.1
"""m, what is added to the angle to an image's own proxies, radians."""

_LEAST_SINE_SQUARED = 1e-12  # below it the slope of the root has no bound


class CaptionLoss(NamedTuple):
    """What captions teach B images.

    values: [B]; 0 for an image without a caption.
    has_captions: Whether it has one [B], bool: the sum of `values` is divided by their number.
    """

    values: Tensor
    has_captions: Tensor


def add_margin(cosines: Tensor, is_own: Tensor, *, margin: float = MARGIN) -> Tensor:
    """The cosines with a margin: cos(θ + m) for an image's own, cos θ for the others.

    Past θ = π - m, where the cosine would rise again, it is cos θ - m·sin(π - m).

    Args:
        cosines: cos θ, any shape.
        is_own: bool, the same shape.
        margin: m in radians, 0 <= m < π.

    Raises:
        ValueError: The margin is out of range.
    """
    if not 0 <= margin < math.pi:
        raise ValueError(f"the margin must be at least 0 and below π, got {margin}")
    sines = (1 - cosines.square()).clamp(min=_LEAST_SINE_SQUARED).sqrt()
    turned = cosines * math.cos(margin) - sines * math.sin(margin)
    linear = cosines - margin * math.sin(math.pi - margin)
    harder = torch.where(cosines > math.cos(math.pi - margin), turned, linear)
    return torch.where(is_own, harder, cosines)


def arc_margin(
    vectors: Tensor, proxies: Tensor, labels: Tensor, *, scale: float = SCALE, margin: float = MARGIN
) -> Tensor:
    """ArcMargin: the cross entropy of s·cos θ with the margin on the image's class.

    Args:
        vectors: [B, D]; normalised here.
        proxies: [V, D]; normalised here.
        labels: The class of each image [B], int64.
        scale: s.
        margin: m in radians.

    Returns:
        [B].
    """
    cosines = functional.normalize(vectors, dim=1) @ functional.normalize(proxies, dim=1).T  # [B, V]
    is_own = functional.one_hot(labels, len(proxies)).bool()
    logits = scale * add_margin(cosines, is_own, margin=margin)
    return functional.cross_entropy(logits, labels, reduction="none")


def mc_arc_margin(
    vectors: Tensor, captions: Tensor, is_own: Tensor, *, scale: float = SCALE, margin: float = MARGIN
) -> CaptionLoss:
    """MCArcMargin: all captions of the batch are proxies, the target is uniform over an image's own.

    Args:
        vectors: [B, D]; normalised here.
        captions: The distinct captions of the whole batch, over all workers [M, D]; normalised here. M may
            be 0.
        is_own: Which captions are an image's [B, M], bool.
        scale: s.
        margin: m in radians, on all of an image's own.
    """
    num_own = is_own.sum(dim=1)
    has_captions = num_own > 0
    if not captions.shape[0]:
        return CaptionLoss(0 * vectors.sum(dim=1), has_captions)
    cosines = functional.normalize(vectors, dim=1) @ functional.normalize(captions, dim=1).T  # [B, M]
    log_p = (scale * add_margin(cosines, is_own, margin=margin)).log_softmax(dim=1)
    own = torch.where(is_own, log_p, torch.zeros_like(log_p)).sum(dim=1)
    return CaptionLoss(-own / num_own.clamp(min=1), has_captions)


def info_nce(images: Tensor, texts: Tensor, *, scale: float) -> Tensor:
    """CLIP's symmetric loss: image i belongs to text i; the mean of both directions [B].

    Args:
        images: [B, D]; normalised here.
        texts: [B, D]; normalised here.
        scale: What cosines are multiplied with; CLIP's own logit scale.
    """
    logits = scale * functional.normalize(images, dim=1) @ functional.normalize(texts, dim=1).T
    own = torch.arange(len(logits), device=logits.device)
    by_image = functional.cross_entropy(logits, own, reduction="none")
    by_text = functional.cross_entropy(logits.T, own, reduction="none")
    return (by_image + by_text) / 2


class ArcMargin(nn.Module):
    """`arc_margin` with its learnt proxies.

    Args:
        num_classes: V.
        dim: D.
        scale: s.
        margin: m in radians.
        seed: Of the proxies, Xavier uniform: the same on all workers.
    """

    def __init__(
        self, num_classes: int, dim: int, *, scale: float = SCALE, margin: float = MARGIN, seed: int = 0
    ) -> None:
        super().__init__()
        self.scale, self.margin = scale, margin
        generator = torch.Generator().manual_seed(seed)
        self.proxies = nn.Parameter(torch.empty(num_classes, dim))
        nn.init.xavier_uniform_(self.proxies, generator=generator)

    def forward(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """The loss of each image [B], for vectors [B, D] and classes [B]."""
        return arc_margin(vectors, self.proxies, labels, scale=self.scale, margin=self.margin)
