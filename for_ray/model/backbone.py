"""CLIP's vision tower without its pooling layer: pixels -> cells.

Three kinds of tower, by how open_clip builds them:

    ModifiedResNet (OpenAI's RN50 … RN50x64)        prefix: the mean of the cells, which CLIP asks with
    timm ViT with MAP pooling (SigLIP, PE-Core)     prefix: the ViT's own class token, mostly none
    VisionTransformer with a class token            prefix: the class token before the last block

`pooling` holds the layer that follows. For the class-token ViT that is the whole last block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from for_ray.errors import ConfigError
from for_ray.model.catalog import RESNET_STRIDE


@dataclass(frozen=True)
class Features:
    """What the pooling layer sees of B images.

    Attributes:
        cells: [B, K, C], row by row, K = height · width; without the pooling layer's own positions.
        prefix: [B, P, C], tokens that are no place in the image; P may be 0.
        height: Of the grid, in cells.
        width: Of the grid, in cells.
    """

    cells: Tensor
    prefix: Tensor
    height: int
    width: int


class Backbone(nn.Module):
    """Turns normalised pixels [B, 3, H, W] into `Features`."""

    visual: Any

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: Tensor) -> Features:
        """Features of normalised pixels [B, 3, H, W]; H and W as the tower was built for."""
        raise NotImplementedError


class ResNetBackbone(Backbone):
    """open_clip's ModifiedResNet up to the feature map of its last stage."""

    def forward(self, pixels: Tensor) -> Features:
        """Features with the mean cell as prefix (eq. 1's x̄)."""
        visual = self.visual
        feature_map = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))
        cells = feature_map.flatten(2).transpose(1, 2)  # [B, C, h, w] -> [B, K, C]
        height, width = feature_map.shape[2:]
        return Features(cells, cells.mean(dim=1, keepdim=True), height, width)


class ClassTokenBackbone(Backbone):
    """open_clip's VisionTransformer up to the input of its last block."""

    def forward(self, pixels: Tensor) -> Features:
        """Features with the class token as prefix."""
        output = self.visual.forward_intermediates(
            pixels,
            indices=[len(self.visual.transformer.resblocks) - 2],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        cells, prefix = output["image_intermediates"][0], output["image_intermediates_prefix"][0]
        patch_height, patch_width = self.visual.patch_size
        return Features(cells, prefix, pixels.shape[2] // patch_height, pixels.shape[3] // patch_width)


class MapBackbone(Backbone):
    """A timm ViT up to its last norm, in front of its attention pool (MAP)."""

    def forward(self, pixels: Tensor) -> Features:
        """Features; the prefix is empty where the pool doesn't look at prefix tokens."""
        trunk = self.visual.trunk
        tokens = trunk.forward_features(pixels)  # [B, P + K, C]
        num_prefix = trunk.num_prefix_tokens
        prefix = tokens[:, : num_prefix if _looks_at_prefix(trunk) else 0]
        height, width = trunk.patch_embed.grid_size
        return Features(tokens[:, num_prefix:], prefix, height, width)


def _looks_at_prefix(trunk: Any) -> bool:
    """Whether the pool's keys include the prefix tokens: timm's EVA towers always, its ViTs if told so."""
    return bool(getattr(trunk, "pool_include_prefix", True))


def make_backbone(visual: nn.Module) -> Backbone:
    """The backbone of an open_clip vision tower.

    Raises:
        ConfigError: The tower pools in a way that has no attention over cells to build on.
    """
    kind = kind_of(visual)
    return {"resnet": ResNetBackbone, "map": MapBackbone, "class_token": ClassTokenBackbone}[kind](visual)


def kind_of(visual: nn.Module) -> str:
    """`resnet`, `map` or `class_token`.

    Raises:
        ConfigError: Another kind of tower.
    """
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if isinstance(visual, ModifiedResNet):
        return "resnet"
    if isinstance(visual, TimmModel):
        pool = getattr(visual.trunk, "attn_pool", None)
        if pool is not None and pool.pos_embed is None and pool.pool == "token":
            return "map"
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type == "tok":
        blocks = visual.transformer.resblocks
        if len(blocks) > 1 and isinstance(blocks[-1], ResidualAttentionBlock):
            return "class_token"
    raise ConfigError(
        f"the vision tower ({type(visual).__name__}) has no pooling attention that can be asked about cells: "
        "take a ModifiedResNet (RN50 … RN50x64), a ViT with MAP pooling (SigLIP) or one with a class token"
    )


def fold_norms(visual: nn.Module) -> None:
    """Put each batch norm of a frozen ModifiedResNet into the convolution before it, in place.

    Same function; the picture book's tower takes a fifth less time on a CPU.
    """
    for module in list(visual.modules()):
        children = dict(module.named_children())
        pairs = [(f"conv{number}", f"bn{number}") for number in (1, 2, 3)] + [("0", "1")]
        for convolution, norm in pairs:
            if isinstance(children.get(norm), nn.BatchNorm2d):
                folded = fuse_conv_bn_eval(children[convolution], children[norm])  # type: ignore[type-var, arg-type]
                setattr(module, convolution, folded)
                setattr(module, norm, nn.Identity())


def resize_positions(visual: nn.Module, image_size: int) -> None:
    """Fit a ModifiedResNet's table of pooling positions to another image size, in place.

    Bicubic and antialiased, as open_clip does it for ViTs on loading; the mean token's row stays.

    Args:
        visual: A ModifiedResNet that holds its weights already.
        image_size: The new input side in pixels, a multiple of 32.
    """
    pool = cast(nn.Module, visual.attnpool)
    table = cast(Tensor, pool.positional_embedding)
    side_before, side = int((len(table) - 1) ** 0.5), image_size // RESNET_STRIDE
    visual.image_size = image_size  # type: ignore[assignment]
    if side == side_before:
        return
    grid = table[1:].detach().T.reshape(1, -1, side_before, side_before).float()
    grid = functional.interpolate(
        grid, size=(side, side), mode="bicubic", antialias=True, align_corners=False
    )
    cells = grid.flatten(2)[0].T.to(table.dtype)  # [1, C, side, side] -> [K, C]
    pool.positional_embedding = nn.Parameter(torch.cat([table[:1].detach(), cells]))
