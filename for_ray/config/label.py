"""The settings of `jobs/pseudo_label.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import CliDualFlag

from for_ray.config.reading import Preset, Settings


class LabelSettings(Settings):
    """Label the images of a data set with the names of a large vocabulary, and keep the backbone's features.

    Settings come from flags over FOR_RAY_… variables over the --config file over the --preset over the
    defaults. Exit code 0: done, or nothing to do; 2: the settings, the data or the store are at fault and
    nothing was written; 1: a stage failed in the middle (run again: what was committed is not labelled
    again); 130: interrupted; 143: ended by SIGTERM.
    """

    dataset: str = Field(
        min_length=1,
        description="coco:ANNOTATIONS.json:IMAGES, lvis:ANNOTATIONS.json:IMAGES, nuimages:ROOT:VERSION or "
        "picturebook:DIR; labels of the data set are used for the report alone",
    )
    output: str = Field(
        min_length=1, description="where the table goes: a folder or s3://bucket/prefix; a table of other "
        "settings there is refused"
    )  # fmt: skip
    split: str | None = Field(
        None,
        min_length=1,
        description='a JSON file {"base": […], "novel": […]}; default: the data set\'s own',
    )
    preset: Preset | None = Field(
        None, description="the paper's settings for a data set (Table 8); give jobs/finetune.py the same"
    )
    encoder: str = Field("picturebook", min_length=1, description="a bundle, or open_clip:MODEL@PRETRAINED")
    head: Literal["cluster", "sum", "dense", "clip"] = Field(
        "cluster", description="whose slots are labelled; the paper's are k-means clusters"
    )
    num_slots: int | None = Field(
        None, ge=1, le=256, description="clusters of an image; default: the encoder's (the paper: 50)"
    )
    image_size: int | None = Field(
        None, ge=32, le=4096, description="side of the model's input in pixels; default: the encoder's"
    )
    vocabulary: str = Field(
        "imagenet21k",
        min_length=1,
        description="imagenet21k (the first name of each class), or a file or s3://… with one name a line",
    )
    exclude_novel: bool = Field(
        False, description="leave out names that mean a novel category: equal, or of one ImageNet class"
    )
    features: CliDualFlag[bool] = Field(
        True, description="store the backbone's features, float16: fine-tuning then needs no images"
    )
    threshold: float = Field(
        5e-4, ge=0, lt=1, description="least probability of a label; what is useful goes with the number of "
        "names and the encoder's logit scale"
    )  # fmt: skip
    num_labels: int = Field(50, ge=1, le=1000, description="labels of an image, at most")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="where images are encoded: auto takes the GPUs that are there, cuda waits for some",
    )
    batch_size: int = Field(64, ge=1, le=4096, description="images that the model takes at once")
    read_threads: int = Field(16, ge=1, le=256, description="objects that a reading task fetches at once")
    min_actors: int = Field(
        1, ge=1, description="labelling actors to start with, one GPU each where there are GPUs"
    )
    max_actors: int | None = Field(
        None, ge=1, description="labelling actors at most; default: what the cluster has room for"
    )
    commit_seconds: float = Field(
        10.0, gt=0, le=3600, description="seconds between commits of what was labelled"
    )
    max_bad_fraction: float = Field(
        0.05, ge=0, le=1, description="share of the data set's images that may be missing, or unreadable"
    )
    config: Path | None = Field(None, description="a TOML file with any of these settings")
    dry_run: bool = Field(False, description="say what would be done, and write nothing")
    json_: bool = Field(
        False, alias="json", description="print one line of JSON as the last line of the output"
    )

    @model_validator(mode="after")
    def _ranges_fit(self) -> LabelSettings:
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors ({self.max_actors}) is below min_actors ({self.min_actors})")
        return self
