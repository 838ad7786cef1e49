"""Small random CLIPs of each kind that open_clip builds, with all their parts doing something."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
RESNET = {"image_size": 96, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
CLASS_TOKEN = {"image_size": 64, "layers": 3, "width": 32, "head_width": 8, "patch_size": 16}
MAP = {
    "image_size": 64,
    "timm_model_name": "for_ray_tiny_map_patch16",
    "timm_pool": "map",
    "timm_proj": "none",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "resnet": {"embed_dim": 24, "vision_cfg": RESNET, "text_cfg": TEXT},
    "class_token": {"embed_dim": 24, "vision_cfg": CLASS_TOKEN, "text_cfg": TEXT},
    "map": {"embed_dim": 24, "vision_cfg": MAP, "text_cfg": TEXT},
}


@register_model
def for_ray_tiny_map_patch16(pretrained: bool = False, **options: Any) -> nn.Module:
    """SigLIP's tower, tiny: no class token, MAP pooling."""
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(name, None)
    return VisionTransformer(
        img_size=64, patch_size=16, embed_dim=24, depth=2, num_heads=3, class_token=False, **options
    )


def make_clip(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """An open_clip model whose norms, biases, latents and layer scales aren't at their neutral values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = open_clip.CLIP(**config)
        for parameter in clip.parameters():
            if parameter.ndim <= 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return clip.eval().requires_grad_(False)


@pytest.fixture(params=sorted(CONFIGS), scope="session")
def clip(request: pytest.FixtureRequest) -> nn.Module:
    return make_clip(CONFIGS[request.param])


@pytest.fixture(scope="session")
def resnet() -> nn.Module:
    return make_clip(CONFIGS["resnet"])


def make_pixels(clip: nn.Module, num_images: int, seed: int = 0) -> torch.Tensor:
    """Normalised pixels that fit the tower."""
    size = clip.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return torch.randn(num_images, 3, height, width, generator=torch.Generator().manual_seed(seed))
