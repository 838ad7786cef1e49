"""The settings of `jobs/evaluate.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode

from for_ray.config.index import Head
from for_ray.config.reading import Settings

Task = Literal["retrieval", "multilabel", "image-to-image", "knn", "zero-shot", "text-to-image"]


class EvaluateSettings(Settings):
    """Measure how well images are found by the names of what they show, on a data set with labels.

    Retrieval: every category is a query, images are ranked by their highest cosine, AP over the first 50 is
    averaged over the base, the novel and all categories (mAP@50). Multilabel: F1 of the three categories that
    an image is nearest to, and mAP, over all categories (GZSL) and over the novel ones (ZSL).

    Image-to-image: every image asks for the others of its class: mAP over the whole ranking, and R@1. Knn:
    the nearest neighbours vote for an image's class, each with its cosine. Zero-shot: the nearest class name,
    through the encoder's prompts. These need one class an image. Text-to-image: every caption asks for its
    images: R@1, R@5, R@10. With several vectors an image they rank as a search does.

    --encoder encodes the data set's images; given more than once, every encoder is a line of the table.
    --index measures a published index instead, beside exact search over its own vectors. Nothing is written
    but --csv. With --json the output is one line: {"map50": {"base": …, "novel": …, "all": …}, …}, or with
    several encoders {"encoders": [{"map50": …, …}, …], …}; what cannot be measured is null.

    Settings come from flags over FOR_RAY_… variables over the --config file over the defaults. Exit code 0:
    measured; 2: the settings, the data or the store are at fault; 1: encoding failed in the middle, or too
    many images could not be read; 130: interrupted; 143: ended by SIGTERM.
    """

    dataset: str = Field(
        min_length=1,
        description="images with labels: coco:ANNOTATIONS.json:IMAGES, lvis:ANNOTATIONS.json:IMAGES, "
        "nuimages:ROOT:VERSION, picturebook:DIR, folder:DIR (of folders named after classes) or labels:FILE "
        "(uri, label); with --task text-to-image pairs:FILE (uri, caption) or picturebook:DIR; each place a "
        "path or s3://…",
    )
    split: str | None = Field(
        None,
        min_length=1,
        description='a file {"base": […], "novel": […]}; other categories are left out. Default: the data '
        "set's own",
    )
    encoder: Annotated[tuple[str, ...] | None, NoDecode] = Field(
        None,
        description="a bundle, or open_clip:MODEL@PRETRAINED; ENCODER#HEAD takes another head than --head. "
        "Several: repeat the flag, or put commas between them. On a cluster of several machines bundles and "
        "weights must be where all reach them",
    )
    head: Head | None = Field(
        None, description="how the feature map becomes vectors; when left out, each encoder's own"
    )
    num_slots: int | None = Field(
        None, ge=1, le=256, description="vectors of an image, at most; default: the encoder's"
    )
    image_size: int | None = Field(
        None, ge=32, le=4096, description="side of the model's input in pixels; default: the encoder's"
    )
    keep_threshold: float | None = Field(
        None,
        gt=0,
        le=1,
        description="slots of an image whose cosine is above this count once; default: the encoder's",
    )
    index: str | None = Field(
        None, min_length=1, description="measure this published index: a folder or s3://bucket/prefix"
    )
    snapshot: int | None = Field(
        None, ge=0, description="of --index, a published snapshot by its number; default: the latest"
    )
    task: Task = Field("retrieval", description="what is measured; multilabel needs --encoder")
    csv: str | None = Field(
        None, min_length=1, description="write AP@50 of every category to this file, or s3://…"
    )
    neighbours: int = Field(21, ge=1, le=10_000, description="--task knn: how many vote")
    gallery: str | None = Field(
        None,
        min_length=1,
        description="--task knn: the data set that neighbours are of, as --dataset; default: --dataset "
        "itself, each image without itself",
    )
    json_: bool = Field(False, alias="json", description="print one line of JSON instead of the tables")
    config: Path | None = Field(None, description="a TOML file with any of these settings")
    batch_size: int = Field(64, ge=1, le=4096, description="images that the model takes at once")
    read_threads: int = Field(16, ge=1, le=256, description="objects that a reading task fetches at once")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="where images are encoded: auto takes the GPUs that are there, cuda waits for some",
    )
    min_actors: int = Field(
        1, ge=1, description="encoding actors to start with, one GPU each where there are GPUs"
    )
    max_actors: int | None = Field(
        None, ge=1, description="encoding actors at most; default: what the cluster has room for"
    )
    max_bad_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        description="share of the data set's images that may be missing, unreadable or not in the index: "
        "they are left out and counted; above it nothing is measured",
    )

    @field_validator("encoder", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        """A variable, a flag and a TOML string are one text, repeated flags arrive with commas between."""
        parts = given.split(",") if isinstance(given, str) else given
        if isinstance(parts, Sequence) and all(isinstance(part, str) for part in parts):
            return tuple(part.strip() for part in parts if part.strip()) or None
        return parts

    @model_validator(mode="after")
    def _measures_one_thing(self) -> EvaluateSettings:
        if (self.encoder is None) == (self.index is None):
            raise ValueError("give either --encoder, what to encode the images with, or --index")
        if self.encoder and len(set(self.encoder)) < len(self.encoder):
            raise ValueError("an encoder is given twice: each would be the same line")
        if self.index is None and self.snapshot is not None:
            raise ValueError("--snapshot goes with --index")
        if self.index is not None:
            self._refuse_with_index()
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors ({self.max_actors}) is below min_actors ({self.min_actors})")
        return self

    @model_validator(mode="after")
    def _task_has_its_settings(self) -> EvaluateSettings:
        if self.task != "knn" and (self.gallery is not None or "neighbours" in self.model_fields_set):
            raise ValueError("--gallery and --neighbours go with --task knn")
        if self.task == "text-to-image" and self.split is not None:
            raise ValueError("--split goes with categories: --task text-to-image has captions")
        return self

    def _refuse_with_index(self) -> None:
        if self.task == "multilabel":
            raise ValueError("--task multilabel needs --encoder: an index ranks images, not categories")
        if self.task != "retrieval":
            raise ValueError(f"--task {self.task} needs --encoder: only retrieval is measured on an index")
        for name in ("head", "num_slots", "image_size", "keep_threshold"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} goes with --encoder: an index has its own")
