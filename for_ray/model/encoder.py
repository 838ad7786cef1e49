"""Backbone, head and text tower together: what jobs and searches use."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from for_ray import storage
from for_ray.errors import ConfigError
from for_ray.model.backbone import Features, fold_norms, kind_of, make_backbone
from for_ray.model.boxes import kept_slots
from for_ray.model.bundle import Bundle
from for_ray.model.encoder_config import POOLING_PREFIX
from for_ray.model.heads import ClipHead, ClusterHead, DenseHead, Head
from for_ray.model.pooling import Pooling, make_pooling
from for_ray.model.preprocess import decode
from for_ray.model.sum_clip import SumHead
from for_ray.model.text import context_length_of, embed_names, fill, is_cut, make_tokenizer
from for_ray.model.towers import build_clip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Precision = Literal["auto", "float32", "float16", "bfloat16"]

CAPTIONS_AT_ONCE = 512

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Encoded(NamedTuple):
    """B encoded images, on the encoder's device.

    vectors: unit length [B, N, D], float32.
    boxes: x0, y0, x1, y1 as fractions of the model's input [B, N, 4], float32.
    keep: whether to store the slot [B, N], bool; False where others say the same.
    """

    vectors: Tensor
    boxes: Tensor
    keep: Tensor


class Encoder(nn.Module):
    """A frozen encoder on its device. `load_encoder` makes it; threads may share it.

    Args:
        bundle: What it is.
        clip: open_clip's model, with weights.
        head: The head, with weights.
        dtype: Of the computation; the weights stay float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, bundle: Bundle, clip: nn.Module, head: Head, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.bundle = bundle
        self.backbone = make_backbone(clip.visual)  # type: ignore[arg-type]
        self.pooling = make_pooling(clip.visual)  # type: ignore[arg-type]
        self.head = head
        self.clip = clip
        self._dtype = dtype
        self._tokenize: Callable[..., Tensor] | None = None
        for name, values in (("mean", bundle.config.mean), ("std", bundle.config.std)):
            self.register_buffer(name, 255 * torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    @property
    def dim(self) -> int:
        """D, the size of the joint space."""
        return self.bundle.dim

    @property
    def num_slots(self) -> int:
        """N, what `encode` gives an image."""
        return self.bundle.num_slots

    @property
    def image_size(self) -> int:
        """Side of the model's input in pixels."""
        return self.bundle.image_size

    @property
    def fingerprint(self) -> str:
        """The bundle's."""
        return self.bundle.fingerprint

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.mean.device

    @property
    def logit_scale(self) -> float:
        """What CLIP multiplies cosines with before a softmax; 100 for OpenAI's models."""
        return float(self.clip.logit_scale.detach().exp())  # type: ignore[operator]

    @torch.inference_mode()
    def encode(self, pixels: Tensor | NDArray[np.uint8]) -> Encoded:
        """Encode decoded images; nothing here waits for the device.

        Args:
            pixels: [B, 3, image_size, image_size] uint8, from `preprocess.decode`, on any device.

        Raises:
            ValueError: The shape or type is wrong.
        """
        return self.encode_with_features(pixels)[0]

    @torch.inference_mode()
    def encode_with_features(self, pixels: Tensor | NDArray[np.uint8]) -> tuple[Encoded, Features]:
        """As `encode`, and the backbone's features that it came from."""
        with self._computing():
            features = self.features(pixels)
            vectors, boxes = self.head(features, self.pooling)
        keep = kept_slots(vectors, self.bundle.config.keep_threshold, self.bundle.keep_rule)
        return Encoded(vectors, boxes, keep), features

    def features(self, pixels: Tensor | NDArray[np.uint8]) -> Features:
        """The backbone's cells of decoded images [B, 3, image_size, image_size] uint8.

        Raises:
            ValueError: The shape or type is wrong.
        """
        pixels = torch.as_tensor(pixels)
        expected = (3, self.image_size, self.image_size)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1:] != expected:
            raise ValueError(f"pixels must be uint8 [B, {expected}], got {pixels.dtype} {list(pixels.shape)}")
        normalised = (self._sent(pixels).float() - self.mean) / self.std
        with self._computing():
            features: Features = self.backbone(normalised.contiguous(memory_format=torch.channels_last))
        return features

    @torch.inference_mode()
    def embed_text(self, names: Sequence[str]) -> NDArray[np.float32]:
        """Names or questions, through the bundle's prompts: unit vectors [Q, D]; computed in float32.

        Raises:
            ConfigError: A name is empty, or the tokenizer can't be had.
        """
        vectors = embed_names(
            names,
            prompts=self.bundle.config.prompts,
            tokenize=lambda texts: self.tokenize(texts).to(self.device),
            encode_text=self.clip.encode_text,  # type: ignore[arg-type]
        )
        return vectors.cpu().numpy()

    @torch.inference_mode()
    def embed_captions(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Captions as they stand, without prompts: unit vectors [Q, D]; computed as images are.

        What is too long for the tower is cut off. A GPU is not waited for before the end: meanwhile the next
        captions become tokens.

        Raises:
            ConfigError: The tokenizer can't be had.
        """
        parts = [torch.empty((0, self.dim), device=self.device)]
        for start in range(0, len(captions), CAPTIONS_AT_ONCE):
            tokens = self.tokenize(captions[start : start + CAPTIONS_AT_ONCE])
            with self._computing():
                vectors = self.clip.encode_text(self._sent(tokens))  # type: ignore[operator]
            parts.append(torch.nn.functional.normalize(vectors.float(), dim=-1))
        return torch.cat(parts).cpu().numpy()

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids [n, L] on the CPU; what is too long is cut off.

        Raises:
            ConfigError: The tokenizer can't be had.
        """
        return self._tokenizer()(list(texts))

    @property
    def context_length(self) -> int:
        """L, the tokens of a text that the text tower reads."""
        return context_length_of(self.bundle.model_config["text_cfg"])

    def reads_whole(self, name: str) -> bool:
        """Whether the text tower reads a name to its end, in all of the bundle's prompts.

        Raises:
            ConfigError: The name is empty, or the tokenizer can't be had.
        """
        texts = fill(self.bundle.config.prompts, name)
        return not is_cut(texts, self._tokenizer(), context_length=self.context_length)

    def _tokenizer(self) -> Callable[..., Tensor]:
        if self._tokenize is None:
            self._tokenize = make_tokenizer(self.bundle.model_config["text_cfg"], self.bundle.name)
        return self._tokenize

    def embed_image(self, image: bytes) -> NDArray[np.float32]:
        """A picture as the index would store it: its distinct slots as unit vectors [n, D], 1 <= n <= N.

        Raises:
            DataError: The picture can't be decoded.
        """
        config = self.bundle.config
        decoded = decode(
            image,
            image_size=config.image_size,
            resize_mode=config.resize_mode,
            interpolation=config.interpolation,
        )
        encoded = self.encode(decoded.pixels[None])
        return np.asarray(encoded.vectors[encoded.keep].cpu().numpy(), np.float32)

    def _sent(self, values: Tensor) -> Tensor:
        """On the device, or on its way there."""
        if self.device.type == "cuda" and values.device.type == "cpu":
            values = values.pin_memory()  # only from pinned memory does the copy overlap with work
        return values.to(self.device, non_blocking=True)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        is_lower = self._dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self._dtype if is_lower else None, enabled=is_lower):
            yield


def load_encoder(bundle: Bundle, device: str = "auto", *, precision: Precision = "auto") -> Encoder:
    """Build a bundle's encoder and load its weights.

    Args:
        bundle: From `open_bundle`.
        device: `cpu`, `cuda`, `cuda:1` … or `auto`: the GPU if there is one.
        precision: Of images and captions; `auto` is float16 on a GPU and float32 on a CPU, where the result
            then is the same on each run. Names and questions are always float32.

    Raises:
        ConfigError: No such device, or the weights can't be had or don't fit.
        DataError: A file of the bundle is not what its checksum says.
        StorageError: The store refused.
    """
    target = _device(device)
    if precision == "auto":
        precision = "float32" if target.type == "cpu" else "float16"
    clip = build_clip(bundle)
    if kind_of(clip.visual) == "resnet":  # type: ignore[arg-type]
        fold_norms(clip.visual)  # type: ignore[arg-type]
    pooling = make_pooling(clip.visual)  # type: ignore[arg-type]
    head = make_head(bundle, pooling.width)
    if bundle.config.tuned_pooling:
        load_pooling(bundle, pooling)
    encoder = Encoder(bundle, clip, head, dtype=_DTYPES[precision])
    encoder.backbone.to(memory_format=torch.channels_last)
    return encoder.to(target).eval().requires_grad_(False)


def make_head(bundle: Bundle, width: int) -> Head:
    """The bundle's head, with its weights, on the CPU.

    Args:
        bundle: What it is.
        width: C, size of the backbone's cells.

    Raises:
        ConfigError: The weights don't fit.
        DataError: `head.safetensors` is not what its checksum says.
        StorageError: The store refused.
    """
    config = bundle.config
    if config.head in ("clip", "mcip"):
        return ClipHead()
    if config.head == "dense":
        return DenseHead(with_positions=config.dense_positions)
    if config.head == "cluster":
        return ClusterHead(config.num_slots, with_positions=config.dense_positions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.head_seed or 0)
        head = SumHead(
            width,
            config.num_slots,
            num_layers=config.decoder_layers,
            feedforward_width=config.decoder_width,
            with_prefix=config.mean_token,
        )
    if (state := trained_state(bundle)) is not None:
        own = {name: value for name, value in state.items() if not name.startswith(POOLING_PREFIX)}
        _load(head, own, bundle.name)
    return head


def load_pooling(bundle: Bundle, pooling: Pooling) -> None:
    """Put the trained layers of a bundle's pooling attention in the place of CLIP's.

    Raises:
        ConfigError: They don't fit.
        DataError: `head.safetensors` is not what its checksum says.
        StorageError: The store refused.
    """
    state = pooling.state_dict()
    for name, value in (trained_state(bundle) or {}).items():
        if name.startswith(POOLING_PREFIX):
            state[name.removeprefix(POOLING_PREFIX)] = value
    _load(pooling, state, bundle.name)


def trained_state(bundle: Bundle) -> dict[str, Tensor] | None:
    """The content of the bundle's `head.safetensors`; None where it has none.

    Raises:
        DataError: The file is not what its checksum says.
        StorageError: The store refused.
    """
    if bundle.head_uri is None or bundle.config.head_sha256 is None:
        return None
    from safetensors.torch import load_file

    state: dict[str, Tensor] = load_file(
        storage.local_copy(bundle.head_uri, sha256=bundle.config.head_sha256)
    )
    return state


def _load(module: nn.Module, state: dict[str, Tensor], name: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ConfigError(f"head.safetensors doesn't fit {name}: {reason}") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"no device {name!r} here ({reason}): expected auto, cpu or cuda") from error
    return device
