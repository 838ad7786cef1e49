"""What open_clip knows: model configs, and how each set of weights was trained.

Model configs are read from open_clip's JSON files without importing it, which takes seconds.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from for_ray.errors import ConfigError

ModelConfig = dict[str, Any]

QUICK_GELU_SUFFIX = "-quickgelu"
"""open_clip's mark of the activation that OpenAI trained with; understood behind any name here."""

RESNET_STRIDE = 32
"""Pixels of the side of a ModifiedResNet's cell."""


def model_names() -> list[str]:
    """The names of open_clip's model configs, sorted."""
    return sorted(path.stem for path in _configs_path().glob("*.json"))


def named_model(name: str) -> ModelConfig:
    """open_clip's model config of that name; `-quickgelu` may stand behind any name.

    Raises:
        ConfigError: open_clip has no such model; the closest names are listed.
    """
    path = _configs_path() / f"{name}.json"
    if path.is_file() and path.parent == _configs_path():
        config: ModelConfig = json.loads(path.read_text("utf-8"))
        return config
    if name.endswith(QUICK_GELU_SUFFIX):
        return named_model(name.removesuffix(QUICK_GELU_SUFFIX)) | {"quick_gelu": True}
    raise ConfigError(f"open_clip has no model {name!r}; {closest(name, model_names())}")


def pretrained_tags(name: str) -> list[str]:
    """The tags of weights that open_clip knows for a model; imports open_clip."""
    import open_clip

    return [str(tag) for tag in open_clip.list_pretrained_tags_by_model(_plain(name))]


def pretraining(name: str, tag: str) -> dict[str, Any]:
    """open_clip's record of one set of weights: mean, std, interpolation, resize_mode, quick_gelu, source.

    Raises:
        ConfigError: open_clip knows no such weights; the closest tags are listed.
    """
    import open_clip

    record = open_clip.get_pretrained_cfg(_plain(name), tag)
    if not record:
        tags = pretrained_tags(name)
        hint = closest(tag, tags) if tags else "it knows none: give a weights file instead"
        raise ConfigError(f"open_clip knows no weights {tag!r} of {name}; {hint}")
    return dict(record)


def usual_pretraining(name: str) -> dict[str, Any]:
    """What all weights that open_clip knows of a model have in common; for a file of weights of that model.

    So a file of SigLIP's weights gets SigLIP's mean and std, and one of RN50x64, which only OpenAI
    published, the quick GELU.
    """
    records = [pretraining(name, tag) for tag in pretrained_tags(name)]
    keys = ("mean", "std", "interpolation", "quick_gelu")
    values = {key: [record.get(key) for record in records] for key in keys}
    return {key: seen[0] for key, seen in values.items() if seen and all(value == seen[0] for value in seen)}


def is_resnet(config: ModelConfig) -> bool:
    """Whether the vision tower is a ModifiedResNet."""
    return isinstance(config["vision_cfg"].get("layers"), list)


def num_cells(config: ModelConfig, image_size: int) -> int:
    """K, the cells of a square input of that many pixels.

    Raises:
        ConfigError: The size doesn't suit the tower.
    """
    vision = config["vision_cfg"]
    if is_resnet(config):
        if image_size % RESNET_STRIDE:
            raise ConfigError(f"image_size {image_size} must be a multiple of {RESNET_STRIDE} for a ResNet")
        return (image_size // RESNET_STRIDE) ** 2
    timm_name = vision.get("timm_model_name")
    found = re.search(r"patch(\d+)", timm_name) if timm_name else None
    if timm_name and not found:
        raise ConfigError(f"the timm model {timm_name} doesn't tell its patch size: take one with patch<N>")
    patch_size = int(found[1]) if found else int(vision.get("patch_size", 16))
    if patch_size > image_size:
        raise ConfigError(f"image_size {image_size} is less than one patch of {patch_size} pixels")
    return (image_size // patch_size) ** 2


def closest(name: str, known: Iterable[str]) -> str:
    """A hint: the known names most like `name`, or a few of them."""
    known = list(known)
    by_folded = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_folded, n=4, cutoff=0.5)
    if matches:
        return "did you mean " + ", ".join(by_folded[match] for match in matches) + "?"
    shown = ", ".join(known[:8])
    return f"known are {shown}" + (f" and {len(known) - 8} more" if len(known) > 8 else "")


def _plain(name: str) -> str:
    """The name under which open_clip lists weights."""
    import open_clip

    if open_clip.list_pretrained_tags_by_model(name):
        return name
    return name.removesuffix(QUICK_GELU_SUFFIX)


def _configs_path() -> Path:
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ConfigError("open_clip is not installed: pip install open_clip_torch")
    return Path(spec.origin).parent / "model_configs"
