"""open_clip's model of a bundle, with its weights: both towers, float32, frozen, on the CPU."""

from __future__ import annotations

import copy
import os
import socket
import warnings
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import huggingface_hub
import open_clip
import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from for_ray import storage
from for_ray.errors import ConfigError
from for_ray.model import catalog
from for_ray.model.backbone import kind_of, resize_positions
from for_ray.model.bundle import Bundle


def build_clip(bundle: Bundle) -> nn.Module:
    """Build the model and load its weights; the position embeddings fit the bundle's image size.

    Raises:
        ConfigError: The weights can't be had, or don't fit the model.
        DataError: The weights file is not what its checksum says.
        StorageError: The store refused.
    """
    path = weights_path(bundle)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bundle.config.seed)
        model = _build(bundle)
    if path is not None:
        _load(model, path, bundle)
    kind = kind_of(model.visual)
    if kind == "resnet":
        resize_positions(model.visual, bundle.image_size)
    elif kind == "map" and model.visual.trunk.patch_embed.img_size != (bundle.image_size,) * 2:
        model.visual.set_input_size(bundle.image_size)
    return cast(nn.Module, model.eval().requires_grad_(False))


def check_weights(bundle: Bundle) -> None:
    """Prove that the weights are there and fit, without the memory and time of building the model.

    Raises:
        ConfigError: The weights can't be had, or don't fit the model.
        DataError: The weights file is not what its checksum says.
        StorageError: The store refused.
    """
    path = weights_path(bundle)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # loading into meta tensors copies nothing, as wanted
        model = _build(bundle)
        if path is not None:
            _load(model, path, bundle)
    kind_of(model.visual)


def weights_path(bundle: Bundle) -> Path | None:
    """The weights on this disk, fetched if need be; None for random ones.

    Raises:
        ConfigError: open_clip can't fetch the tag's weights.
        DataError: The file is not what its checksum says.
        StorageError: The store refused.
    """
    config = bundle.config
    if bundle.weights_uri is not None and config.weights_sha256 is not None:
        return storage.local_copy(bundle.weights_uri, sha256=config.weights_sha256)
    if config.pretrained is None:
        return None
    return _fetched(bundle, catalog.pretraining(config.model, config.pretrained))


def _fetched(bundle: Bundle, record: dict[str, Any]) -> Path:
    """The weights of a tag: from the hub's cache without asking the network, else fetched by open_clip."""
    repository, _, file_name = str(record.get("hf_hub", "")).rpartition("/")
    for name in [file_name] if file_name else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]:
        cached = try_to_load_from_cache(repository, name) if repository else None
        if isinstance(cached, str):
            return Path(cached)
    try:
        if repository:
            _require_hub()
        return Path(open_clip.download_pretrained(record))
    except Exception as error:  # the hub's client raises many kinds; all mean that there are no weights
        name = bundle.config.model.removesuffix(catalog.QUICK_GELU_SUFFIX)
        name += catalog.QUICK_GELU_SUFFIX if bundle.quick_gelu else ""
        tag = f"{bundle.config.pretrained} of {bundle.config.model}"
        raise ConfigError(
            f"the weights {tag} are not on this disk and can't be fetched ({_one_line(error)}): fetch "
            f"{file_name or 'open_clip_model.safetensors'} of {repository or record.get('url')} elsewhere, "
            f"copy it here and give open_clip:{name}@PATH"
        ) from error


def _require_hub() -> None:
    """Fail at once where the hub's name is unknown: its client would try again for most of a minute."""
    if not any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)


def _build(bundle: Bundle) -> Any:
    values = copy.deepcopy(bundle.model_config)
    is_custom = bool(values.pop("custom_text", False)) or "hf_model_name" in values["text_cfg"]
    if "multimodal_cfg" in values:
        raise ConfigError(f"{bundle.name}: CoCa models are not supported; take a CLIP or SigLIP model")
    vision, text = values["vision_cfg"], values["text_cfg"]
    if not isinstance(vision.get("layers"), list):
        vision["image_size"] = bundle.image_size
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    values["quick_gelu"] = bundle.quick_gelu
    make = open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
    try:
        return make(**values)
    except (
        TypeError,
        KeyError,
        ValueError,
        RuntimeError,
        AssertionError,
        OSError,
        ZeroDivisionError,
    ) as error:
        raise ConfigError(f"open_clip can't build the model of {bundle.name}: {_one_line(error)}") from error


def _load(model: nn.Module, path: Path, bundle: Bundle) -> None:
    try:
        open_clip.load_checkpoint(model, str(path), strict=True, weights_only=True)
    except Exception as error:  # every kind of wrong file ends here, unpicklers raise what they like
        raise ConfigError(
            f"the weights {path.name} don't fit {bundle.name}: {_first_mismatch(error)}"
        ) from error


def _first_mismatch(error: Exception) -> str:
    """The first key that doesn't fit, out of torch's list of all of them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("Error(s) in loading state_dict"):
        more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
        return f"{lines[1][:300]}{more}"
    if "TorchScript" in str(error) or "torch.jit" in str(error):
        return "it is a TorchScript archive, which runs code: take the .safetensors of the same weights"
    return _one_line(error)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] if text else type(error).__name__
