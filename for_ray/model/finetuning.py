"""One step of fine-tuning, on one worker or many: L = γ_sup · L_sup + γ_pse · L_pse (FOR, §3.3, eq. 5 and 6).

Every worker gets its part of the global batch. What a loss is divided by is the weight of the *global* batch,
so that many workers learn what one learns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from for_ray.model.backbone import Features
from for_ray.model.boxes import kept_slots
from for_ray.model.encoder_config import KeepRule
from for_ray.model.objectives import (
    LossLabels,
    LossName,
    LossSettings,
    Objective,
    Outcome,
    RankObjective,
    num_workers,
)
from for_ray.model.trainer import HaltedError, Trainer

LR_DROP = 0.1
"""What the learning rate is multiplied with at the drop epoch (Table 8)."""

BETAS = (0.9, 0.999)
"""Adam's (Table 8)."""

TINY = 1e-12
"""In the place of a weight of 0: no slot of the whole batch has anything to learn."""


@dataclass(frozen=True)
class AdamSettings:
    """How it is minimised.

    Attributes:
        lr: Learning rate.
        lr_drop_epoch: After this many epochs it is a tenth; None: never.
        num_steps: Steps over which it falls to 0 along half a cosine; None: it does not.
        warmup_steps: Steps in which it rises linearly to its value.
        weight_decay: Of Adam, added to the gradient.
    """

    lr: float = 1e-5
    lr_drop_epoch: int | None = 15
    warmup_steps: int = 0
    weight_decay: float = 1e-4
    num_steps: int | None = None

    def lr_at(self, epoch: int, step: int) -> float:
        """The learning rate of a step; both count from 0, steps from the start of the run."""
        rate = self.lr if self.lr_drop_epoch is None or epoch < self.lr_drop_epoch else self.lr * LR_DROP
        if self.num_steps is not None:
            rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.num_steps)))
        return rate * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else rate


class LossMean(NamedTuple):
    """One loss over the global batch: mean, what it was divided by, labels that got a slot, and the others.

    A weight of 0 says that no slot had anything to learn; the mean is 0 then.
    """

    mean: float
    weight: float
    num_matched: int
    num_dropped: int


class Finetuner(Trainer):
    """Trains an objective step by step; where a process group exists, together with the other workers.

    Args:
        objective: On its device.
        losses: The weights of the losses.
        adam: The optimizer's settings.
        dtype: Of the computation: float32, or a lower one by autocast, float16 with scaled gradients.
    """

    def __init__(
        self,
        objective: Objective | RankObjective,
        losses: LossSettings,
        adam: AdamSettings,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(objective, dtype=dtype)
        self.objective, self._losses, self._adam = objective, losses, adam
        self.optimizer = torch.optim.Adam(
            self.trained.values(), lr=adam.lr, betas=BETAS, weight_decay=adam.weight_decay, fused=True
        )

    def step(
        self, features: Features, labels: Mapping[LossName, LossLabels], *, epoch: int, step: int
    ) -> dict[LossName, LossMean]:
        """Learn from one global batch; this worker has its part of it.

        Args:
            features: Of this worker's images; at least one, with or without labels.
            labels: By loss.
            epoch: From 0.
            step: From 0, counted from the start of the run.

        Returns:
            Each loss over the global batch, the same on all workers.

        Raises:
            HaltedError: A vector or a loss is not finite; nothing was changed.
        """
        self.objective.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self._adam.lr_at(epoch, step)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            outcome: Outcome = self._model(features, labels)
        totals, num_broken = self._add_up(outcome)
        means = {name: _mean(total) for name, total in totals.items()}
        if num_broken or not all(math.isfinite(each.mean) for each in means.values()):
            what = f"the vectors of {num_broken} images are" if num_broken else "the loss is"
            raise HaltedError(
                f"epoch {epoch + 1}, step {step}: {what} not finite; take a lower --lr, more "
                "--warmup-steps or --precision float32"
            )
        if not any(each.weight for each in means.values()):
            return means  # Adam would move the weights by its decay alone
        # DDP averages the gradients of the workers; their sum is wanted.
        parts = [
            self._losses.gamma(name) / max(totals[name].weight, TINY) * sums.loss
            for name, sums in outcome.sums.items()
        ]
        loss = num_workers() * torch.stack(parts).sum()
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return means

    def _add_up(self, outcome: Outcome) -> tuple[dict[LossName, LossTotal], int]:
        """The sums over all workers. A step waits for the device here, to match, and to pick images."""
        parts = [torch.stack([part.detach().double() for part in sums]) for sums in outcome.sums.values()]
        totals = torch.cat([*parts, outcome.num_broken.double()[None]])
        if num_workers() > 1:
            distributed.all_reduce(totals)
        *values, num_broken = totals.tolist()
        of_loss = {name: LossTotal(*values[4 * i : 4 * i + 4]) for i, name in enumerate(outcome.sums)}
        return of_loss, int(num_broken)


class LossTotal(NamedTuple):
    """`LossSums` over the global batch, as numbers."""

    loss: float
    weight: float
    num_matched: float
    num_dropped: float


def _mean(total: LossTotal) -> LossMean:
    mean = total.loss / max(total.weight, TINY)
    return LossMean(mean, total.weight, int(total.num_matched), int(total.num_dropped))


def set_dropout(head: nn.Module, dropout: float) -> None:
    """Give all dropouts of a head this probability: bundles don't keep it."""
    for module in head.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = dropout


@torch.no_grad()
def max_cosines(
    vectors: Tensor, text: Tensor, *, keep_threshold: float = 1.0, keep_rule: KeepRule = "distinct"
) -> Tensor:
    """Each category's score of each image: the highest cosine among the slots that an index would store.

    Args:
        vectors: Unit vectors [B, N, D].
        text: Unit vectors [V, D].
        keep_threshold: Of `kept_slots`.
        keep_rule: Likewise.

    Returns:
        [V, B], float32.
    """
    cosines = vectors @ text.T  # [B, N, D] -> [B, N, V]
    keep = kept_slots(vectors, keep_threshold, keep_rule)
    return cosines.masked_fill(~keep[..., None], -2.0).amax(dim=1).T
