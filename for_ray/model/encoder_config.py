"""`encoder.toml`: the settings of an encoder, read and written."""

from __future__ import annotations

import json
import tomllib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from for_ray.errors import ConfigError, DataError
from for_ray.model.preprocess import Interpolation, ResizeMode
from for_ray.model.text import SEVEN_PROMPTS
from for_ray.schema import MAX_SLOTS

HeadName = Literal["sum", "cluster", "dense", "clip", "mcip"]
KeepRule = Literal["distinct", "apart"]

POOLING_PREFIX = "pooling."
"""What the names of the pooling layer's tensors in `head.safetensors` begin with."""

_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class EncoderConfig(BaseModel):
    """`encoder.toml`: everything about an encoder but its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str = Field(description="what people call it; not part of the fingerprint")
    model: str = Field(description="a name that open_clip knows, or the bundle's model config (*.json)")
    pretrained: str | None = Field(
        None,
        description="a tag that open_clip knows, or the bundle's weights file; none: random, from `seed`",
    )
    weights_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="of the weights file")
    seed: int = Field(0, description="of random weights")
    quick_gelu: bool | None = Field(None, description="OpenAI's activation; none: as the model config says")
    head: HeadName = "cluster"
    num_slots: int = Field(50, ge=1, le=MAX_SLOTS, description="N of `sum` and `cluster`")
    image_size: int = Field(ge=1, le=4096, description="side of the model's input in pixels")
    resize_mode: ResizeMode = Field(
        "squash", description="squash shows the whole image, as the paper does; shortest crops; longest pads"
    )
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = _OPENAI_MEAN
    std: tuple[float, float, float] = _OPENAI_STD
    prompts: tuple[str, ...] = Field(SEVEN_PROMPTS, min_length=1, description="each with {} for the name")
    keep_threshold: float = Field(
        0.97, gt=0, le=1, description="slots of an image whose cosine is above this are kept once; 1: all"
    )
    keep_rule: KeepRule = Field(
        "distinct",
        description="`sum`: the cosine with an earlier kept slot (distinct), or with the mean of the image's "
        "slots (apart)",
    )
    dense_positions: bool = Field(
        False, description="`dense` and `cluster` of a ResNet: add the pooling positions to the cells"
    )
    decoder_layers: int = Field(2, ge=0, le=12, description="of `sum`")
    decoder_width: int = Field(2048, ge=1, description="hidden width of `sum`'s feed-forward")
    mean_token: bool = Field(False, description="`sum`: mean (ViT: class) token among the pooling's keys")
    head_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="of `head.safetensors`")
    tuned_pooling: bool = Field(
        False, description="`head.safetensors` holds layers of the pooling attention, too; for any head"
    )
    head_seed: int | None = Field(
        None, description="`sum` untrained, fresh from this seed: tests, benchmarks"
    )
    recipes: str | None = Field(
        None, description="what tuned the towers, in this order, such as mcip,realign; needed by head `mcip`"
    )


def make_config(values: dict[str, Any], where: str) -> EncoderConfig:
    """A validated config.

    Raises:
        ConfigError: A value is missing, unknown or out of range; `where` says of what.
    """
    try:
        return EncoderConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {field}: {first['msg']}, got {first['input']!r}") from error


def dump_toml(config: EncoderConfig) -> str:
    """The config as TOML, one setting a line; what is none is left out. JSON's literals are TOML's too."""
    values = config.model_dump(mode="json", exclude_none=True)
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())


def load_toml(content: bytes, where: str) -> dict[str, Any]:
    """The settings in a TOML file.

    Raises:
        DataError: It is no TOML.
    """
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{where} is not readable TOML: {' '.join(str(error).split())}") from error
