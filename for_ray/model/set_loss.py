"""The set-prediction loss on class probabilities alone (FOR, §3.3, eq. 5 and 6; DETR without boxes)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from for_ray.model.matching import Matches, match


class LossSums(NamedTuple):
    """Sums over a batch, so that those of several workers can be added up; the loss is loss / weight.

    loss: Σ w·cross entropy, scalar, differentiable.
    weight: Σ w, scalar; 0 where no slot had anything to learn.
    num_matched: Labels that got a slot, scalar int64.
    num_dropped: Labels that got none because the image has more labels than slots, scalar int64.
    """

    loss: Tensor
    weight: Tensor
    num_matched: Tensor
    num_dropped: Tensor


class SetLoss(nn.Module):
    """Cross entropy of slots with the labels that Hungarian matching gives them.

    p̂_i(c) = softmax over the categories of logit_scale · cos(ŷ_i, e_c). ∅ is one more, learnable logit where
    `null_weight` is above 0, and absent where it is 0.

    Args:
        text: Unit vectors of the categories [V, D], frozen.
        logit_scale: What cosines are multiplied with.
        null_weight: w_∅, the weight of a slot that no label was given to; labels weigh 1.
        is_ranked: Labels come the most probable first: of more than there are slots, the first get one.
            Otherwise the slots' own probabilities decide.
    """

    text: Tensor

    def __init__(
        self, text: Tensor, *, logit_scale: float, null_weight: float, is_ranked: bool = False
    ) -> None:
        super().__init__()
        self._is_ranked = is_ranked
        self.register_buffer("text", text, persistent=False)
        self.logit_scale, self.null_weight = logit_scale, null_weight
        self.null_logit = nn.Parameter(torch.zeros(())) if null_weight > 0 else None

    def forward(
        self,
        vectors: Tensor,
        labels: Tensor,
        *,
        candidates: Tensor | None = None,
    ) -> LossSums:
        """The loss of B images.

        Args:
            vectors: Unit vectors [B, N, D]; computed in their type, float32 at least.
            labels: Indices into the categories [B, T], int64, an image's differ; -1 behind the last.
            candidates: bool [B, V]: the categories that take part in an image's softmax, its labels among
                them; all where None.

        Raises:
            ValueError: Shapes do not go together, or a probability is not finite.
            IndexError: A label is outside the categories (on a GPU: CUDA's own error).
        """
        self._check(vectors, labels)
        num_given = (labels >= 0).sum()
        if self._is_ranked:
            labels = labels[:, : vectors.shape[1]]
        logits = self._logits(vectors, candidates)
        total = logits.logsumexp(dim=2)  # [B, N]
        if self.null_logit is not None:
            total = torch.logaddexp(total, self.null_logit.to(total.dtype))
        wanted = labels.clamp(min=0)[:, None, :].expand(-1, vectors.shape[1], -1)
        log_probability = logits.gather(2, wanted) - total[..., None]  # [B, N, V] -> [B, N, T]
        pairs = match(log_probability.detach().exp(), labels)
        matched = log_probability[pairs.images, pairs.slots, pairs.columns]  # [M]
        loss, weight = -matched.sum(), torch.ones_like(matched).sum()
        if self.null_logit is not None:
            unmatched = _unmatched(pairs, total)
            loss = loss - self.null_weight * ((self.null_logit - total) * unmatched).sum()
            weight = weight + self.null_weight * unmatched.sum()
        num_matched = torch.full_like(num_given, len(matched))  # filled on the device: no copy to wait for
        return LossSums(loss, weight, num_matched, num_given - num_matched)

    def _check(self, vectors: Tensor, labels: Tensor) -> None:
        if vectors.ndim != 3 or vectors.shape[2] != self.text.shape[1]:
            raise ValueError(f"expected vectors [B, N, {self.text.shape[1]}], got {list(vectors.shape)}")
        if labels.ndim != 2 or len(labels) != len(vectors):
            raise ValueError(f"expected labels [{len(vectors)}, T], got {list(labels.shape)}")

    def _logits(self, vectors: Tensor, candidates: Tensor | None) -> Tensor:
        """logit_scale · cos(ŷ_i, e_c) [B, N, V]; -inf where a category takes no part."""
        vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
        with torch.autocast(vectors.device.type, enabled=False):
            logits = self.logit_scale * (vectors @ self.text.to(vectors.dtype).T)
        return logits if candidates is None else logits.masked_fill(~candidates[:, None, :], -torch.inf)


def _unmatched(pairs: Matches, like: Tensor) -> Tensor:
    """1 where a slot has no label, else 0 [B, N]."""
    unmatched = torch.ones_like(like, requires_grad=False)
    unmatched[pairs.images, pairs.slots] = 0
    return unmatched
