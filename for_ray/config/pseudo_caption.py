"""The settings of `jobs/pseudo_caption.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from for_ray.config.reading import Settings


class PseudoCaptionSettings(Settings):
    """Give each image of a data set the nearest captions of a large set, for jobs/finetune.py --recipe mcip.

    The captions are embedded as they stand, and indexed; each image looks there for its nearest, which are
    then compared exactly. Captions under the threshold do not count: an image may have none. The captions'
    vectors are kept: the same captions and encoder again, for other images or another threshold, need not be
    embedded again.

    Settings come from flags over FOR_RAY_… variables over the --config file over the defaults. Exit code 0:
    done, or done before; 2: the settings, the data or the store are at fault, or no caption is over the
    threshold; 1: a stage failed in the middle; 130: interrupted; 143: ended by SIGTERM.
    """

    dataset: str = Field(
        min_length=1,
        description="the images: folder:DIR, labels:FILE, picturebook:DIR, coco:ANNOTATIONS.json:IMAGES, …; "
        "as for jobs/finetune.py",
    )
    captions: str = Field(
        min_length=1,
        description="the captions, a file or s3://…: .txt (one a line), .tsv (as CC12M's), .parquet (column "
        "caption) or the picture book's captions.jsonl; UTF-8",
    )
    encoder: str = Field(
        "picturebook",
        min_length=1,
        description="a bundle, or open_clip:MODEL@PRETRAINED: that is tuned later",
    )
    output: str = Field(
        min_length=1,
        description="where the table goes: a folder that all workers reach, or s3://bucket/prefix",
    )
    vectors: str | None = Field(
        None,
        min_length=1,
        description="where the captions' vectors are kept and looked for, as --output; default: in that",
    )
    threshold: float = Field(0.27, ge=-1, le=1, description="captions with a lower cosine do not count")
    captions_per_image: int = Field(20, ge=1, le=1000, description="the nearest captions, at most")
    image_size: int | None = Field(
        None, ge=32, le=4096, description="side of the model's input in pixels; default: the encoder's"
    )
    batch_size: int = Field(64, ge=1, le=4096, description="images that the model takes at once")
    read_threads: int = Field(16, ge=1, le=256, description="objects that a reading task fetches at once")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="where images and captions are embedded: auto takes the GPUs that are there, cuda waits "
        "for some",
    )
    min_actors: int = Field(
        1, ge=1, description="embedding actors to start with, one GPU each where there are GPUs"
    )
    max_actors: int | None = Field(
        None, ge=1, description="embedding actors at most; default: what the cluster has room for"
    )
    max_bad_fraction: float = Field(
        0.05, ge=0, le=1, description="share of the images that may be missing or unreadable"
    )
    config: Path | None = Field(None, description="a TOML file with any of these settings")
    json_: bool = Field(
        False, alias="json", description="print one line of JSON as the last line of the output"
    )

    @model_validator(mode="after")
    def _actors_fit(self) -> PseudoCaptionSettings:
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors ({self.max_actors}) is below min_actors ({self.min_actors})")
        return self
