"""What fine-tuning minimises: a head, and the losses on what it says, L = γ_sup · L_sup + γ_pse · L_pse.

`Objective` is the paper's (FOR, §3.3, eq. 5 and 6): a set-prediction loss on labels and one on pseudo-labels.
`RankObjective` asks of a batch's images which of them show a name. Both give sums, so that those of several
workers can be added up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn

from for_ray.model.backbone import Features
from for_ray.model.rank_loss import Rows, WindowTeacher, rank_loss
from for_ray.model.set_loss import LossSums, SetLoss
from for_ray.model.slot_model import SlotModel

LossName = Literal["sup", "pse"]
"""On the labels of base categories, or on pseudo-labels: what the encoder itself believes of a vocabulary.
The ranking loss takes these from its teacher, as probabilities."""

ObjectiveName = Literal["set", "rank"]
"""What a softmax is over: the names, for each slot (set), or the images, for each name (rank)."""

SAME_NAME = 1 - 1e-5
"""Names whose texts have a higher cosine are one."""


@dataclass(frozen=True)
class LossSettings:
    """What is minimised.

    Attributes:
        losses: Which losses.
        gamma_sup: Weight of the loss on labels.
        gamma_pse: Weight of the loss on pseudo-labels.
        null_weight: w_∅ of the set-prediction loss; 0 leaves ∅ out.
        objective: `set`: the paper's set-prediction loss; `rank`: the ranking loss.
    """

    losses: tuple[LossName, ...] = ("sup", "pse")
    gamma_sup: float = 1.0
    gamma_pse: float = 1.0
    null_weight: float = 0.1
    objective: ObjectiveName = "set"

    def gamma(self, name: LossName) -> float:
        """The weight of a loss."""
        return self.gamma_sup if name == "sup" else self.gamma_pse


class LossLabels(NamedTuple):
    """What one loss has to know of a worker's B images.

    labels: Indices into the loss's categories [B, T], int64, -1 where there is none.
    is_known: Whether the image takes part in this loss [B], bool.
    candidates: The categories of an image's softmax [B, V], bool; None: all. For the ranking loss: those
        whose absence is known where they are no labels.
    names: The ranking loss: which of the other names it is about in this step [M]; None: all.
    most_rows: The ranking loss: images of the worker that has most of this step's; None: B.
    """

    labels: Tensor
    is_known: Tensor
    candidates: Tensor | None = None
    names: Tensor | None = None
    most_rows: int | None = None

    def to(self, device: torch.device) -> LossLabels:
        """The same on another device."""
        return LossLabels(
            *(part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in self)  # type: ignore[arg-type]
        )


class Outcome(NamedTuple):
    """A worker's losses by their names, and the number of images whose vectors are not finite."""

    sums: dict[LossName, LossSums]
    num_broken: Tensor


class Objective(nn.Module):
    """The head that is trained, and the losses on what it says; all that has a gradient is in here.

    Args:
        slots: The head and its pooling layer.
        texts: Unit vectors of each loss's categories [V, D].
        settings: Which losses, and their ∅.
        logit_scale: CLIP's.
    """

    def __init__(
        self,
        slots: SlotModel,
        texts: Mapping[LossName, Tensor],
        settings: LossSettings,
        *,
        logit_scale: float,
    ) -> None:
        super().__init__()
        self.slots, self._names = slots, settings.losses
        self.losses = nn.ModuleDict(
            {
                name: SetLoss(
                    texts[name],
                    logit_scale=logit_scale,
                    null_weight=settings.null_weight,
                    is_ranked=name == "pse",
                )
                for name in settings.losses
            }
        )

    def forward(self, features: Features, labels: Mapping[LossName, LossLabels]) -> Outcome:
        """The losses of a worker's images; vectors that are not finite count as broken, and as zeros."""
        vectors, num_broken = _finite(self.slots(features))
        sums: dict[LossName, LossSums] = {}
        for name in self._names:
            known = labels[name].is_known.nonzero().squeeze(1)
            candidates = labels[name].candidates
            sums[name] = self.losses[name](
                vectors[known],
                labels[name].labels[known],
                candidates=None if candidates is None else candidates[known],
            )
        return Outcome(sums, num_broken)


class RankObjective(nn.Module):
    """The head that is trained, and the ranking loss on what it says.

    L_sup is the mean over the base categories that a labelled image of the batch shows, L_pse over all other
    names; a name that is a base category and in the vocabulary, too, is learnt once.

    Args:
        slots: The head and its pooling layer, before these are trained.
        texts: Unit vectors of the base categories (`sup`) and of the vocabulary (`pse`) [V, D].
        settings: Which losses; without `pse` there is no teacher.
        logit_scale: CLIP's.
        with_positions: See `WindowTeacher`.
    """

    base: Tensor
    others: Tensor

    def __init__(
        self,
        slots: SlotModel,
        texts: Mapping[LossName, Tensor],
        settings: LossSettings,
        *,
        logit_scale: float,
        with_positions: bool = False,
    ) -> None:
        super().__init__()
        self.slots, self._logit_scale = slots, logit_scale
        some = next(iter(texts.values()))
        base = texts["sup"] if "sup" in settings.losses else some[:0]
        others = texts["pse"] if "pse" in settings.losses else some[:0]
        if len(base) and len(others):
            others = others[(others @ base.T).amax(dim=1) < SAME_NAME]
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("others", others, persistent=False)
        self._names = settings.losses
        self.teacher = None
        if "pse" in settings.losses:
            self.teacher = WindowTeacher(slots.pooling, with_positions=with_positions)

    def forward(self, features: Features, labels: Mapping[LossName, LossLabels]) -> Outcome:
        """The loss over the global batch, as far as this worker's images have a part in it."""
        vectors, num_broken = _finite(self.slots(features))
        some = labels[self._names[0]]
        drawn = labels["pse"].names if "pse" in self._names else None
        text = torch.cat([self.base, self.others if drawn is None else self.others[drawn]])
        with torch.autocast(vectors.device.type, enabled=False):
            scores = self._logit_scale * (vectors.float() @ text.T).amax(dim=1)  # [B, N, V] -> [B, V]
        teacher = torch.zeros_like(scores)
        if self.teacher is not None:
            teacher = self._logit_scale * self.teacher(features, text)
        is_positive, is_negative = self._labelled(labels)
        is_known = torch.stack([labels[name].is_known for name in self._names]).any(dim=0)
        mine = Rows(scores, teacher, is_positive, is_negative, is_known)
        rows = gather_rows(mine, some.most_rows or len(vectors))
        found = rank_loss(rows, has_teacher=self.teacher is not None)
        sums: dict[LossName, LossSums] = {}
        if "sup" in self._names:
            num_matched = (is_positive & rows.is_positive.any(dim=0)).sum()
            sums["sup"] = _share(found.labelled, found.num_labelled, num_matched)
        if "pse" in self._names:
            sums["pse"] = _share(found.others, found.num_others, torch.zeros_like(found.num_others))
        return Outcome(sums, num_broken)

    def _labelled(self, labels: Mapping[LossName, LossLabels]) -> tuple[Tensor, Tensor]:
        """Whether an image is labelled with a base category; whether it is known not to show it [B, C]."""
        if "sup" not in self._names:
            nothing = labels["pse"].is_known[:, None].expand(-1, 0)
            return nothing, nothing
        given, num_base = labels["sup"], len(self.base)
        is_label = torch.zeros((len(given.labels), num_base + 1), dtype=torch.bool, device=self.base.device)
        places = torch.where(given.labels < 0, num_base, given.labels)
        is_label = is_label.scatter_(1, places, True)[:, :num_base]
        is_annotated = given.is_known[:, None]
        if given.candidates is not None:
            is_annotated = is_annotated & given.candidates
        return is_label & given.is_known[:, None], is_annotated & ~is_label


def _finite(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors, zeros where an image's are not all finite, and the number of such images."""
    is_broken = ~vectors.isfinite().flatten(1).all(dim=1)
    return torch.where(is_broken[:, None, None], 0.0, vectors), is_broken.sum()


def _share(total: Tensor, count: Tensor, num_matched: Tensor) -> LossSums:
    """What a worker tells of a sum that all workers have: their values add up, each gradient is its own."""
    world = num_workers()
    loss = total - (1 - 1 / world) * total.detach()
    return LossSums(loss, count / world, num_matched, torch.zeros_like(num_matched))


def gather_rows(mine: Rows, most_rows: int) -> Rows:
    """The rows of all workers, the gradient that of one's own; padded rows take no part.

    Args:
        mine: This worker's.
        most_rows: Of the worker that has most.
    """
    if num_workers() == 1:
        return mine
    num_rows, widths = len(mine.scores), [part.shape[1] for part in mine[:4]]
    packed = torch.cat([*(part.detach().float() for part in mine[:4]), mine.is_known[:, None].float()], dim=1)
    packed = nn.functional.pad(packed, (0, 0, 0, most_rows - num_rows))
    parts = [torch.empty_like(packed) for _ in range(num_workers())]
    distributed.all_gather(parts, packed)
    scores, teacher, positive, negative, known = torch.split(torch.cat(parts), [*widths, 1], dim=1)
    first = distributed.get_rank() * most_rows
    scores = torch.cat([scores[:first], mine.scores.float(), scores[first + num_rows :]])
    return Rows(scores, teacher, positive.bool(), negative.bool(), known[:, 0].bool())


def num_workers() -> int:
    """How many train together; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
