"""Which slot answers for which label: the assignment with the largest sum of probabilities."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


class Matches(NamedTuple):
    """M pairs of all B images, image after image.

    images: int64 [M].
    slots: int64 [M]; an image's are different from each other, ascending.
    columns: int64 [M], which of the image's labels the slot answers for; different from each other, too.
    """

    images: Tensor
    slots: Tensor
    columns: Tensor


def match(probability: Tensor, labels: Tensor) -> Matches:
    """Give each label a slot of its own so that the sum of probabilities is largest.

    Source: FOR, eq. 5; DETR's matcher without boxes. An image with T labels gets min(N, T) pairs: of more
    labels than slots those stay that make the sum largest.

    Args:
        probability: p(label | slot) [B, N, T], any floating type; what stands in columns without a label
            does not matter. Copied to the host once.
        labels: int64 [B, T], -1 where there is no label.

    Returns:
        The pairs, on the device of `probability`.

    Raises:
        ValueError: The shapes differ, or a probability of a label is not finite.
    """
    if probability.ndim != 3 or (probability.shape[0], probability.shape[2]) != tuple(labels.shape):
        raise ValueError(f"probability {list(probability.shape)} does not fit labels {list(labels.shape)}")
    costs = probability.detach().float().cpu().numpy()  # the one wait for the device
    present = labels.cpu().numpy() >= 0
    pairs = [_match_image(cost, columns) for cost, columns in zip(costs, present, strict=True)]
    images = np.repeat(np.arange(len(pairs)), [len(slots) for slots, _ in pairs])
    flat = [np.concatenate([np.empty(0, np.int64), *part]) for part in zip(*pairs, strict=True)]
    slots, columns = flat or (np.empty(0, np.int64), np.empty(0, np.int64))
    return Matches(*(torch.from_numpy(part).to(probability.device) for part in (images, slots, columns)))


def _match_image(probability: np.ndarray, is_label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The slots [m] and columns [m] of one image, from its probabilities [N, T]."""
    columns = np.flatnonzero(is_label)
    wanted = probability[:, columns]
    if not np.isfinite(wanted).all():
        raise ValueError("a probability is not finite: the loss or the features hold NaN")
    # Labels as rows: all slots want the likeliest labels, and scipy, with as many of both, searches by rows.
    chosen, slots = linear_sum_assignment(wanted.T, maximize=True)
    order = slots.argsort()
    return slots[order], columns[chosen[order]]
