"""The ranking loss: for each name, which of a batch's images show it. Beyond the paper, see `set_loss`.

The set-prediction loss is a softmax over names, for each slot: it says nothing about one image against
another, which is what retrieval ranks. Here the softmax is over the images of a batch, for each name, as in
the text-to-image half of CLIP's own loss. What it should be comes from a teacher, listwise: the frozen tower
itself, by windows of its feature map; and labels correct the teacher where there are some.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from for_ray.model.backbone import Features
from for_ray.model.pooling import Pooling

WINDOWS = (1 / 6, 1 / 3, 1 / 2)
"""Sides of the teacher's windows, as shares of the feature map's: objects of different sizes."""


class WindowTeacher(nn.Module):
    """What the frozen tower believes of images, without any training.

    A single cell is noisy, and k-means' clusters are not much less. The mean of the projected cells of a
    window is nearer to the name of an object of its size; the best window counts, and the mean over the
    windows' sizes is steadier than any of them.

    Args:
        pooling: The tower's, before it is tuned; copied.
        with_positions: Cells keep their positions, as the encoder's dense head has it.
    """

    def __init__(self, pooling: Pooling, *, with_positions: bool = False) -> None:
        super().__init__()
        self._pooling = copy.deepcopy(pooling).requires_grad_(False)
        self._with_positions = with_positions

    @torch.no_grad()
    def forward(self, features: Features, text: Tensor) -> Tensor:
        """Cosines [B, V] between images and names, unit vectors [V, D]: the mean over the windows' sizes."""
        cells = self._pooling.project_cells(features, with_positions=self._with_positions)
        with torch.autocast(cells.device.type, enabled=False):
            maps = cells.float().transpose(1, 2)  # [B, K, D] -> [B, D, K]
            maps = maps.reshape(*maps.shape[:2], features.height, features.width)
            best = [self._best(maps, text.float(), share) for share in WINDOWS]
        return torch.stack(best).mean(dim=0)

    @staticmethod
    def _best(maps: Tensor, text: Tensor, share: float) -> Tensor:
        sides = [max(1, round(share * side)) for side in maps.shape[2:]]
        means = functional.avg_pool2d(maps, sides, stride=1).flatten(2)  # [B, D, H, W] -> [B, D, P]
        cosines = text @ functional.normalize(means, dim=1)  # [V, D] · [B, D, P] -> [B, V, P]
        return cosines.amax(dim=2)


class Rows(NamedTuple):
    """What a loss knows of B images and V names, the first C of which may be labelled.

    scores: What the model says: logit scale · highest cosine of the slots [B, V].
    teacher: What the teacher says, likewise; zeros without one.
    is_positive: Labelled with the name [B, C], bool.
    is_negative: Labelled, and not with the name [B, C], bool.
    is_known: Whether the image takes part [B], bool.
    """

    scores: Tensor
    teacher: Tensor
    is_positive: Tensor
    is_negative: Tensor
    is_known: Tensor


class RankSums(NamedTuple):
    """Σ over names of KL(target ‖ model), in nats, differentiable; and the number of these names [scalars].

    labelled: Of the names that an image of the batch is labelled with.
    num_labelled: How many.
    others: Of the names that the teacher alone speaks of.
    num_others: How many.
    """

    labelled: Tensor
    num_labelled: Tensor
    others: Tensor
    num_others: Tensor


def rank_loss(rows: Rows, *, has_teacher: bool) -> RankSums:
    """How far the model's order of the images of one global batch is from what it should be.

    Targets are the teacher's softmax over the images. Of a name that a labelled image of the batch shows, all
    that are labelled with it count as much as the teacher's likeliest image, and those labelled without it
    not at all; images without labels keep what the teacher says of them, or take no part without a teacher.

    Args:
        rows: All images of the batch.
        has_teacher: Whether `teacher` says anything; if not, only names with a labelled image are learnt.
    """
    num_names = rows.scores.shape[1]
    is_positive = rows.is_positive & rows.is_known[:, None]
    is_negative = rows.is_negative & rows.is_known[:, None]
    is_labelled = _widen(is_positive.any(dim=0), num_names)  # [V]
    is_in = rows.is_known[:, None].expand(-1, num_names)
    if not has_teacher:
        is_in = _widen(is_positive | is_negative, num_names)
    believed = torch.where(is_in, rows.teacher, -torch.inf)
    corrected = torch.where(_widen(is_positive, num_names), believed.amax(dim=0), believed)
    corrected = corrected.masked_fill(_widen(is_negative, num_names), -torch.inf)
    # A finite floor: where no image takes part, the softmax is defined all the same, and not learnt from.
    floor = torch.finfo(rows.scores.dtype).min
    target = torch.where(is_labelled, corrected, believed).clamp(min=floor).softmax(dim=0)
    model = torch.where(is_in, rows.scores, floor).log_softmax(dim=0)
    divergence = functional.kl_div(model, target, reduction="none").sum(dim=0)  # [B, V] -> [V]
    is_other = ~is_labelled & is_in.any(dim=0) if has_teacher else torch.zeros_like(is_labelled)
    return RankSums(
        labelled=(divergence * is_labelled).sum(),
        num_labelled=is_labelled.sum(),
        others=(divergence * is_other).sum(),
        num_others=is_other.sum(),
    )


def _widen(of_labels: Tensor, num_names: int) -> Tensor:
    """[…, C] to […, V]: nothing is labelled with the other names."""
    return functional.pad(of_labels, (0, num_names - of_labels.shape[-1]))
