"""Where bundles come from: a folder with `encoder.toml`, or a model and weights by name or file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from for_ray import storage
from for_ray.errors import ConfigError, DataError
from for_ray.model import catalog
from for_ray.model.bundle import Bundle, packaged
from for_ray.model.encoder_config import load_toml, make_config

_WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_RANDOM = "random"


def bundle_of_folder(folder: str, changes: dict[str, Any], *, allow_untrained: bool) -> Bundle:
    """Open a bundle's folder (path or uri); see `open_bundle`."""
    config_uri = storage.join_uri(folder, "encoder.toml")
    if not storage.exists(config_uri):
        raise ConfigError(_unknown(folder))
    values = load_toml(storage.read_bytes(config_uri), config_uri)
    name = str(values.get("model", ""))
    if name.endswith(".json"):
        model_config = _read_model(storage.join_uri(folder, _inside(name, config_uri)))["model_cfg"]
    else:
        model_config = catalog.named_model(name)
    values = {"image_size": _native_size(model_config, config_uri)} | values | changes
    weights_uri = head_uri = None
    if str(values.get("pretrained", "")).endswith(_WEIGHTS_SUFFIXES):
        weights_uri = storage.join_uri(folder, _inside(values["pretrained"], config_uri))
        weights_uri, values["weights_sha256"] = _known_weights(weights_uri, values.get("weights_sha256"))
    if values.get("head_sha256"):
        head_uri = storage.join_uri(folder, "head.safetensors")
    elif values.get("head") == "sum" and allow_untrained:
        values.setdefault("head_seed", 0)
    return Bundle(make_config(values, config_uri), model_config, weights_uri, head_uri)


def bundle_of_open_clip(spec: str, changes: dict[str, Any], *, allow_untrained: bool) -> Bundle:
    """Open `MODEL@PRETRAINED`; see `open_bundle`."""
    model, pretrained = _split(spec)
    source = _read_model(model) if model.endswith(".json") else {"model_cfg": catalog.named_model(model)}
    values: dict[str, Any] = {"name": f"open_clip:{spec}", "model": model, "pretrained": pretrained}
    weights_uri = None
    if pretrained == _RANDOM:
        if not allow_untrained:
            raise ConfigError(f"open_clip:{spec} has random weights, which find nothing: name trained ones")
        values["pretrained"] = None
    elif pretrained.endswith(_WEIGHTS_SUFFIXES):
        weights_uri, values["weights_sha256"] = _known_weights(pretrained, None)
        if not model.endswith(".json"):
            values |= _pixels(catalog.usual_pretraining(model))
    elif model.endswith(".json"):
        raise ConfigError(
            f"{pretrained!r} is no weights file ({', '.join(_WEIGHTS_SUFFIXES)}): "
            "a model-config file goes with a weights file; tags go with names that open_clip knows"
        )
    else:
        values |= _pixels(catalog.pretraining(model, pretrained))
    values |= _pixels(source.get("preprocess_cfg", {}))
    if model.endswith(catalog.QUICK_GELU_SUFFIX):
        values["quick_gelu"] = True
    if changes.get("head") == "sum" and allow_untrained:
        values["head_seed"] = 0
    model_config = source["model_cfg"]
    values = {"image_size": _native_size(model_config, model)} | values | changes
    return Bundle(make_config(values, f"open_clip:{spec}"), model_config, weights_uri)


def _split(spec: str) -> tuple[str, str]:
    """MODEL and PRETRAINED of `MODEL@PRETRAINED`; either may be a path or uri with `/` or `@` in it."""
    if ".json@" in spec:
        model, _, pretrained = spec.partition(".json@")
        model += ".json"
    else:
        model, _, pretrained = spec.partition("@") if "@" in spec else spec.partition("/")
    if not model or not pretrained:
        raise ConfigError(
            f"open_clip:{spec} names no weights: expected open_clip:MODEL@PRETRAINED{_tags(model)}"
        )
    return model, pretrained


def _tags(model: str) -> str:
    if not model or model.endswith(".json"):
        return ""
    catalog.named_model(model)  # an unknown model is the more important thing to say
    tags = catalog.pretrained_tags(model)
    return f", such as open_clip:{model}@{tags[0]}" if tags else ""


def _unknown(encoder: str) -> str:
    """Why a folder is no encoder."""
    if storage.is_s3(encoder) or "/" in encoder or Path(encoder).exists():
        return f"no encoder at {storage.shown(encoder)}: expected a folder with encoder.toml"
    names = [*packaged(), *(f"open_clip:{name}@…" for name in catalog.model_names())]
    return (
        f"unknown encoder {encoder!r}; {catalog.closest(encoder, names)} "
        "Expected picturebook, a bundle's folder, or open_clip:MODEL@PRETRAINED"
    )


def _read_model(uri: str) -> dict[str, Any]:
    """A model-config JSON, bare or as open_clip saves it with `model_cfg` and `preprocess_cfg`."""
    if not storage.exists(uri):
        raise ConfigError(f"no model config at {storage.shown(uri)}: expected open_clip's JSON")
    try:
        content = json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise ConfigError(f"{storage.shown(uri)} is not readable JSON: {error}") from error
    if isinstance(content, dict) and "model_cfg" not in content:
        content = {"model_cfg": content}
    model = content.get("model_cfg") if isinstance(content, dict) else None
    missing = [
        key
        for key in ("embed_dim", "vision_cfg", "text_cfg")
        if not isinstance(model, dict) or key not in model
    ]
    if missing:
        raise ConfigError(
            f"{storage.shown(uri)} is no model config of open_clip: it has no {', '.join(missing)}"
        )
    return dict(content)


def _native_size(model_config: catalog.ModelConfig, where: str) -> int:
    size = model_config["vision_cfg"].get("image_size", 224)
    if isinstance(size, list):
        if len(set(size)) > 1:
            raise ConfigError(f"{where}: the model takes {size} pixels; only square inputs are supported")
        size = size[0]
    return int(size)


def _pixels(record: dict[str, Any]) -> dict[str, Any]:
    """What a record of pretraining says about pixels and activation; not how to resize: `EncoderConfig`."""
    values = {key: record[key] for key in ("mean", "std", "interpolation") if record.get(key) is not None}
    if record.get("quick_gelu"):
        values["quick_gelu"] = True
    return values


def _inside(name: str, where: str) -> str:
    if "/" in name or "\\" in name or name.startswith("."):
        raise ConfigError(f"{where}: {name!r} must be the name of a file inside the bundle")
    return name


def _known_weights(uri: str, sha256: str | None) -> tuple[str, str]:
    """The weights file and its checksum; the checksum is computed where nobody wrote it down."""
    if sha256 is not None:
        return uri, sha256
    if not storage.exists(uri):
        raise ConfigError(f"no weights at {storage.shown(uri)}: check the path")
    path = _fetched(uri) if storage.is_s3(uri) else storage.local_path(uri)
    if not path.is_file():
        raise ConfigError(
            f"{storage.shown(uri)} is no file: expected weights ({', '.join(_WEIGHTS_SUFFIXES)})"
        )
    try:
        with path.open("rb") as file:
            return str(path), hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{storage.shown(uri)} can't be read: {error.strerror}") from error


def _fetched(uri: str) -> Path:
    """An object of unknown checksum, fetched once for each of its states."""
    home = os.environ.get("XDG_CACHE_HOME")
    state = hashlib.sha256(f"{uri} {storage.stat(uri).etag}".encode()).hexdigest()
    path = (Path(home) if home else Path.home() / ".cache") / "for_ray" / f"weights-{state}{Path(uri).suffix}"
    if not path.exists():
        storage.download(uri, path)
    return path
