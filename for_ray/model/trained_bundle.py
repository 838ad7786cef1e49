"""The two ends of fine-tuning: an encoder whose head is to be trained, and the bundle that comes of it."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from for_ray.model.bundle import Bundle, check, open_bundle
from for_ray.model.encoder_config import POOLING_PREFIX
from for_ray.storage import temporary_folder

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HeadSettings:
    """The head that is trained.

    Attributes:
        head: `sum`, `clip` or `dense`.
        num_slots: N of `sum`.
        num_layers: Decoder layers of `sum`.
        feedforward_width: Hidden width of theirs.
        mean_token: `sum`: the mean token (ViT: the class token) is among the keys of the pooling layer.
        seed: Of the fresh weights.
    """

    head: Literal["sum", "clip", "dense"] = "sum"
    num_slots: int = 50
    num_layers: int = 2
    feedforward_width: int = 2048
    mean_token: bool = False
    seed: int = 0


def untrained_bundle(encoder: str, settings: HeadSettings, *, image_size: int | None = None) -> Bundle:
    """An encoder with CLIP's own pooling layer and a fresh head; what it was trained to before is dropped.

    Args:
        encoder: As in `open_bundle`.
        settings: The head.
        image_size: Side of the model's input in pixels; the encoder's own where None.

    Raises:
        ConfigError: The encoder is unknown, incomplete, or the head cannot stand on it.
        DataError: A file of the bundle is not what its checksum says.
        StorageError: The store refused.
    """
    bundle = open_bundle(encoder, head="clip", image_size=image_size)
    changes: dict[str, Any] = {"head": settings.head, "head_sha256": None, "tuned_pooling": False}
    if settings.head == "sum":
        changes |= {
            "num_slots": settings.num_slots,
            "decoder_layers": settings.num_layers,
            "decoder_width": settings.feedforward_width,
            "mean_token": settings.mean_token,
            "head_seed": settings.seed,
            "keep_rule": "apart",  # a third of the slots then loses next to nothing: benchmarks/slots.py
        }
    config = bundle.config.model_copy(update=changes)
    bundle = Bundle(config, bundle.model_config, bundle.weights_uri)
    check(bundle)
    return bundle


def save_trained(bundle: Bundle, state: dict[str, Tensor], uri: str, *, name: str | None = None) -> Bundle:
    """Write a bundle whose head, or pooling layer, was trained.

    Args:
        bundle: What was trained, from `untrained_bundle`.
        state: `SlotModel.trained_state()`.
        uri: A folder or `s3://bucket/prefix`.
        name: What people call the encoder; as before where None.

    Returns:
        The bundle as it lies there; its weights are those of `uri`.

    Raises:
        StorageError: The store or the disk refused.
        DataError: CLIP's weights changed since the bundle was opened.
    """
    from safetensors.torch import save

    content = save(state)
    with temporary_folder() as folder:
        path = folder / "head.safetensors"
        path.write_bytes(content)
        changes = {
            "head_sha256": hashlib.sha256(content).hexdigest(),
            "head_seed": None,
            "tuned_pooling": any(key.startswith(POOLING_PREFIX) for key in state),
            "name": name or bundle.name,
        }
        config = bundle.config.model_copy(update=changes)
        dataclasses.replace(bundle, config=config, head_uri=str(path)).save(uri)
    return open_bundle(uri)
