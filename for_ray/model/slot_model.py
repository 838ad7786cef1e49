"""What fine-tuning trains: a head over the frozen backbone's features, and perhaps its pooling layer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from for_ray.errors import ConfigError
from for_ray.model.backbone import Features
from for_ray.model.heads import DenseHead, Head
from for_ray.model.pooling import Pooling, ResNetPooling

Freeze = Literal["qkvo", "vo", "none"]
"""Which linear layers of the pooling attention stay as CLIP has them: query, key, value, output (Table 4)."""

_TRAINED: dict[Freeze, tuple[str, ...]] = {
    "qkvo": (),
    "vo": ("q_proj", "k_proj"),
    "none": ("q_proj", "k_proj", "v_proj", "c_proj"),
}


class SlotModel(nn.Module):
    """A head and the pooling layer that it asks; shares the weights of the encoder that they come from.

    Args:
        head: `sum`, or `clip` and `dense`, which have nothing to train but the pooling layer.
        pooling: The frozen tower's.
        freeze: What of the pooling layer is not trained; its positions never are.

    Raises:
        ConfigError: Nothing is left to train, or the pooling layer has no layers of these names.
    """

    def __init__(self, head: Head, pooling: Pooling, *, freeze: Freeze = "qkvo") -> None:
        super().__init__()
        if freeze != "qkvo" and not isinstance(pooling, ResNetPooling):
            raise ConfigError(f"freeze {freeze} is for CLIP's ResNets; other towers take freeze qkvo")
        self.head, self.pooling = head, pooling
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        for name in _TRAINED[freeze]:
            # A cell on its own is neither asked nor compared: q and k would have no gradient.
            if not (isinstance(head, DenseHead) and name in ("q_proj", "k_proj")):
                getattr(pooling.pool, name).requires_grad_(True)
        if not self.trained_parameters():
            raise ConfigError(f"with freeze {freeze} this head has nothing to train: take freeze none")

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def trained_state(self) -> dict[str, Tensor]:
        """What differs from the encoder that it began with, on the CPU: the content of `head.safetensors`.

        The head's tensors under their own names; of the pooling layer those that are trained, each under
        `pooling.` and its name.
        """
        state = dict(self.head.state_dict())
        trained = {
            f"pooling.{name}": value for name, value in self.pooling.named_parameters() if value.requires_grad
        }
        return {name: value.detach().cpu().contiguous() for name, value in {**state, **trained}.items()}

    def forward(self, features: Features) -> Tensor:
        """Unit vectors [B, N, D], float32."""
        vectors: Tensor = self.head(features, self.pooling).vectors
        return vectors


def as_features(tokens: Tensor, *, num_prefix: int, height: int, width: int) -> Features:
    """Features out of the tokens [B, P + K, C] that a cache keeps: the prefix first, then the cells."""
    if tokens.ndim != 3 or tokens.shape[1] != num_prefix + height * width:
        raise ValueError(f"expected [B, {num_prefix} + {height} · {width}, C], got {list(tokens.shape)}")
    return Features(tokens[:, num_prefix:], tokens[:, :num_prefix], height, width)


def as_tokens(features: Features) -> Tensor:
    """What a cache keeps of features [B, P + K, C]: the prefix first, then the cells."""
    return torch.cat([features.prefix, features.cells], dim=1)
