"""An encoder on disk: which CLIP, which head, and how images reach it.

    <bundle>/encoder.toml        `EncoderConfig`
    <bundle>/model.json          open_clip's model config, unless `model` is a name that open_clip knows
    <bundle>/weights.safetensors CLIP's weights, unless `pretrained` is a tag that open_clip knows
    <bundle>/head.safetensors    what fine-tuning trained: a `sum` head, layers of the pooling attention

`open_bundle` also takes `open_clip:MODEL@PRETRAINED`, a bundle that is not on disk yet. Opening reads small
files only and doesn't import torch, except for `open_clip:` with a tag, which asks open_clip.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from for_ray import storage
from for_ray.errors import ConfigError
from for_ray.model import catalog
from for_ray.model.encoder_config import EncoderConfig, KeepRule, dump_toml
from for_ray.model.preprocess import ResizeMode
from for_ray.schema import MAX_SLOTS

_VECTORS_VERSION = 1
"""Part of every fingerprint: raise it when a change of this package changes vectors or boxes."""

_ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Bundle:
    """An opened encoder; `load_encoder` makes it run.

    Attributes:
        config: All settings, none left open.
        model_config: open_clip's model config.
        weights_uri: CLIP's weights; none where `pretrained` is a tag, or the weights are random.
        head_uri: What fine-tuning trained; none where nothing was.
    """

    config: EncoderConfig
    model_config: catalog.ModelConfig
    weights_uri: str | None = None
    head_uri: str | None = None

    @property
    def name(self) -> str:
        """What people call it."""
        return self.config.name

    @property
    def dim(self) -> int:
        """D, the size of the joint space."""
        return int(self.model_config["embed_dim"])

    @property
    def image_size(self) -> int:
        """Side of the model's input in pixels."""
        return self.config.image_size

    @property
    def resize_mode(self) -> ResizeMode:
        """How images are brought to the model's input."""
        return self.config.resize_mode

    @property
    def quick_gelu(self) -> bool:
        """Whether the towers use OpenAI's activation."""
        given = self.config.quick_gelu
        return bool(self.model_config.get("quick_gelu", False)) if given is None else given

    @property
    def num_slots(self) -> int:
        """N as the encoder gives it: at most the number of cells; before `keep` takes duplicates away."""
        config = self.config
        cells = catalog.num_cells(self.model_config, self.image_size)
        return {
            "clip": 1,
            "mcip": 1,
            "dense": cells,
            "cluster": min(config.num_slots, cells),
            "sum": config.num_slots,
        }[config.head]

    @property
    def keep_rule(self) -> KeepRule:
        """Which slots of an image are stored; a trained rule is for the slots of `sum` alone."""
        return self.config.keep_rule if self.config.head == "sum" else "distinct"

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of what determines vectors and boxes; not of names, places and prompts.

        Weights count by their SHA-256, tags by model name and tag: so the same weights by tag and as a file
        are two encoders.
        """
        content = json.dumps(self._essence(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @cached_property
    def backbone_fingerprint(self) -> str:
        """16 hex digits of what determines the backbone's features: the same whatever the head is."""
        essence = {name: self._essence()[name] for name in ("version", "model", "weights", "pixels")}
        content = json.dumps(essence, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @cached_property
    def text_fingerprint(self) -> str:
        """16 hex digits of what determines the vectors of names: the model, its weights, and the prompts."""
        essence = {name: self._essence()[name] for name in ("version", "model", "weights")}
        content = json.dumps([essence, self.config.prompts], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _essence(self) -> dict[str, Any]:
        config = self.config
        weights = config.weights_sha256 or (
            f"{config.model}@{config.pretrained}" if config.pretrained else config.seed
        )
        of_cells: dict[str, Any] = {"num_slots": self.num_slots, "dense_positions": config.dense_positions}
        of_head = {
            "clip": {},
            "mcip": {},
            "dense": of_cells,
            "cluster": of_cells,
            "sum": {
                "num_slots": config.num_slots,
                "layers": config.decoder_layers,
                "width": config.decoder_width,
                "mean_token": config.mean_token,
                "weights": config.head_sha256 or config.head_seed,
            },
        }[config.head]
        tuned = {"pooling": config.head_sha256} if config.tuned_pooling else {}
        pixels = [config.image_size, config.resize_mode, config.interpolation, config.mean, config.std]
        return {
            "version": _VECTORS_VERSION,
            "model": self.model_config | {"quick_gelu": self.quick_gelu},
            "weights": weights,
            "pixels": pixels,
            "head": [config.head, of_head],
            "keep_threshold": config.keep_threshold,
            **({"keep_rule": self.keep_rule} if self.keep_rule != "distinct" else {}),
            **tuned,
        }

    def save(self, uri: str) -> None:
        """Write the bundle to a folder or `s3://bucket/prefix`; what is there already is left alone.

        Raises:
            StorageError: The store or the disk refused.
            DataError: Weights changed since the bundle was opened.
        """
        config_uri = storage.join_uri(uri, "encoder.toml")
        changes: dict[str, Any] = {}
        if self.config.model.endswith(".json"):
            changes["model"] = "model.json"
        if self.weights_uri is not None:
            changes["pretrained"] = "weights" + Path(self.weights_uri).suffix
        content = dump_toml(self.config.model_copy(update=changes)).encode()
        if storage.exists(config_uri) and storage.read_bytes(config_uri) == content:
            return
        if "model" in changes:
            model = json.dumps(self.model_config, indent=2).encode()
            storage.write_bytes(storage.join_uri(uri, "model.json"), model)
        for source, sha256, target in (
            (self.weights_uri, self.config.weights_sha256, changes.get("pretrained")),
            (self.head_uri, self.config.head_sha256, "head.safetensors"),
        ):
            if source is not None and sha256 is not None and target is not None:
                storage.upload(storage.local_copy(source, sha256=sha256), storage.join_uri(uri, target))
        storage.write_bytes(config_uri, content)  # last: a bundle without it is none


def open_bundle(
    encoder: str,
    *,
    head: str | None = None,
    num_slots: int | None = None,
    image_size: int | None = None,
    keep_threshold: float | None = None,
    resize_mode: str | None = None,
    allow_untrained: bool = False,
) -> Bundle:
    """Open an encoder; what is not given stays as the bundle says.

    Args:
        encoder: `picturebook`, the path or uri of a bundle's folder, or `open_clip:MODEL@PRETRAINED` (also
            `MODEL/PRETRAINED`). MODEL is a name that open_clip knows, or a model-config JSON (path or uri);
            PRETRAINED a tag that open_clip knows, a weights file (path or uri), or `random`. Files of
            OpenAI's weights need the name with `-quickgelu`, unless OpenAI alone published the model.
        head: `sum`, `cluster`, `dense`, `clip` or `mcip`.
        num_slots: N of `sum` and `cluster`.
        image_size: Side of the model's input in pixels; positions are interpolated.
        keep_threshold: Cosine above which slots of an image are stored once, or by the bundle's `keep_rule`
            not at all.
        resize_mode: `squash`, `shortest` or `longest`.
        allow_untrained: Accept random weights and a `sum` head without weights: tests, benchmarks, training.

    Raises:
        ConfigError: The encoder is unknown, incomplete, or its settings don't go together.
        DataError: A file of the bundle is not what its checksum says.
        StorageError: The store refused.
    """
    from for_ray.model.sources import bundle_of_folder, bundle_of_open_clip

    changes = {
        "head": head,
        "num_slots": num_slots,
        "image_size": image_size,
        "keep_threshold": keep_threshold,
        "resize_mode": resize_mode,
    }
    given = {key: value for key, value in changes.items() if value is not None}
    if encoder.startswith("open_clip:"):
        bundle = bundle_of_open_clip(
            encoder.removeprefix("open_clip:"), given, allow_untrained=allow_untrained
        )
    else:
        folder = str(_ASSETS / encoder) if encoder in packaged() else encoder
        bundle = bundle_of_folder(folder, given, allow_untrained=allow_untrained)
    check(bundle)
    return bundle


def packaged() -> list[str]:
    """The names of the encoders that come with this package."""
    return sorted(path.parent.name for path in _ASSETS.glob("*/model.json"))


def check(bundle: Bundle) -> None:
    """Refuse what can be known to fail without the weights.

    Raises:
        ConfigError: The first such thing.
    """
    config = bundle.config
    catalog.num_cells(bundle.model_config, bundle.image_size)  # refuses a side that is not made of cells
    for prompt in config.prompts:
        if prompt.count("{}") != 1:
            raise ConfigError(f"the prompt {prompt!r} must contain {{}} once, where the name goes")
    if config.head == "mcip" and not config.recipes:
        raise ConfigError(
            f"the encoder {config.name} has no tuned image tower: tune it (jobs/finetune.py --recipe mcip) "
            "and give its bundle, or take head clip"
        )
    if config.head == "sum" and config.head_sha256 is None and config.head_seed is None:
        raise ConfigError(
            f"the encoder {config.name} has no trained sum head: train one (jobs/finetune.py) and give its "
            "bundle, or take head cluster, which needs no training"
        )


def check_indexable(bundle: Bundle) -> None:
    """Refuse an encoder that gives an image more vectors than an index can number.

    Raises:
        ConfigError: Head `dense` has too many cells.
    """
    if bundle.num_slots > MAX_SLOTS:
        raise ConfigError(
            f"head {bundle.config.head} at image_size {bundle.image_size} gives {bundle.num_slots} vectors "
            f"an image, at most {MAX_SLOTS} can be indexed: take head cluster, or a smaller image_size"
        )
