"""The settings of `jobs/index.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from for_ray.config.reading import Settings

Head = Literal["sum", "cluster", "dense", "clip", "mcip"]


class IndexSettings(Settings):
    """Keep an index of a folder or bucket of images up to date.

    Settings come from flags over FOR_RAY_… variables over the --config file over the defaults. Exit code 0:
    done, or nothing to do; 2: the settings, the images or the store are at fault and nothing was published;
    1: a stage failed in the middle (run again: what was committed is not encoded again); 130: interrupted;
    143: ended by SIGTERM.
    """

    images: str | None = Field(
        None,
        min_length=1,
        description="the images: a folder, s3://bucket/prefix, a Parquet manifest (uri, etag) or tars. The "
        "index will hold these and no others: of several prefixes name their common one, or a manifest. "
        "Not needed with --list-snapshots, --rollback, --verify, --show-quarantine and --plan-vectors",
    )
    index: str = Field(
        "",
        min_length=1,
        description="the index: a folder or s3://bucket/prefix; made when it is not there. Needed but for "
        "--plan-vectors",
    )
    encoder: str | None = Field(
        None,
        min_length=1,
        description="a bundle, or open_clip:MODEL@PRETRAINED; by default the index's own, or `picturebook` "
        "for a new index. Another encoder than the index's builds beside it and takes over when published",
    )
    head: Head | None = Field(
        None, description="how the feature map becomes vectors; when left out, the encoder's own"
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
        description="slots of an image whose cosine is above this are stored once; default: the encoder's",
    )
    config: Path | None = Field(None, description="a TOML file with any of these settings")
    dry_run: bool = Field(False, description="say what would be done, and write nothing")
    json_: bool = Field(
        False, alias="json", description="print one line of JSON as the last line of the output"
    )
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
    commit_seconds: float = Field(
        10.0, gt=0, le=3600, description="seconds between commits of what was encoded"
    )
    max_bad_fraction: float = Field(
        0.05, ge=0, le=1, description="share of images that may be unreadable; above it nothing is published"
    )
    max_gone_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the images in the index that may be gone from --images; above it nothing is "
        "written, since a mistyped --images would empty the index. 1 allows all",
    )
    codec: str | None = Field(
        None,
        min_length=1,
        description="FAISS factory string of the segments, with an IVF; `auto`: from the number of "
        "vectors; default: what the index was built with, else `auto`",
    )
    target_recall: float = Field(
        0.95,
        ge=0,
        le=1,
        description="recall at 50 against exact search that nprobe is raised for, and the code's bits are "
        "chosen by",
    )
    task_memory: float | None = Field(
        None,
        ge=0.5,
        le=100_000,
        allow_inf_nan=False,
        description="memory in GB of a task that trains, builds or merges, at most half of what Ray "
        "leaves to tasks of a node; more is for larger segments and, where there are very many vectors, more "
        "lists. Default: 4.29",
    )
    min_recall: float | None = Field(
        None,
        ge=0,
        le=1,
        description="a build that finds less than this share of what exact search finds is not published; "
        "default: 0.1 less than target_recall",
    )
    plan_vectors: float | None = Field(
        None,
        ge=1,
        le=1e15,
        allow_inf_nan=False,
        description="print what an index of so many vectors takes (1e9 will do), and do nothing else; the "
        "encoder says their dimensions and how many an image has",
    )
    plan_nodes: int | None = Field(
        None, ge=1, le=1_000_000, description="nodes to plan for; default: as many as it takes"
    )
    plan_node_memory: float = Field(
        64.0,
        ge=4,
        le=1_000_000,
        allow_inf_nan=False,
        description="memory in GB of each of these nodes; default: the CPU nodes' of cluster.yaml",
    )
    plan_node_cpus: int = Field(
        16, ge=1, le=10_000, description="cores of each of these nodes; default: likewise"
    )

    retry_quarantined: bool = Field(
        False, description="try the quarantined images again, though they are what they were"
    )
    keep_snapshots: int = Field(
        7, ge=1, le=10_000, description="snapshots that are kept for a rollback, however old"
    )
    keep_days: float = Field(
        7.0, ge=0, le=36_500, description="days that a snapshot stays after another took its place"
    )
    list_snapshots: bool = Field(False, description="print the published snapshots, and do nothing else")
    rollback: int | None = Field(
        None, ge=1, description="publish this snapshot once more, until the next run publishes another"
    )
    verify: bool = Field(
        False,
        description="check the published snapshot from end to end, and change nothing; exit code 1 and a "
        "list of what is wrong where something is",
    )
    show_quarantine: bool = Field(
        False, description="print the images that could not be read, with their reasons"
    )

    @property
    def least_recall(self) -> float:
        """`min_recall`, or what it is where nothing is said."""
        return max(0.0, self.target_recall - 0.1) if self.min_recall is None else self.min_recall

    @property
    def upkeep(self) -> str | None:
        """What is to be done to the index instead of a run; None for a run."""
        names = ("list_snapshots", "verify", "show_quarantine")
        chosen = [name for name in names if getattr(self, name)]
        return chosen[0] if chosen else "rollback" if self.rollback is not None else None

    @model_validator(mode="after")
    def _says_what_to_do(self) -> IndexSettings:
        chosen = [self.list_snapshots, self.verify, self.show_quarantine, self.rollback is not None]
        if sum(chosen) > 1:
            raise ValueError("--list-snapshots, --rollback, --verify and --show-quarantine go one at a time")
        if self.plan_vectors is not None:
            if any(chosen):
                raise ValueError("--plan-vectors goes alone; leave the other one out")
            return self
        if not self.index:
            raise ValueError("--index is missing; --help lists the flags")
        if not any(chosen) and self.images is None:
            raise ValueError("--images is missing; --help lists the flags")
        return self

    @model_validator(mode="after")
    def _ranges_fit(self) -> IndexSettings:
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors ({self.max_actors}) is below min_actors ({self.min_actors})")
        if self.min_recall is not None and self.min_recall > self.target_recall:
            raise ValueError(f"min_recall ({self.min_recall}) is above target_recall ({self.target_recall})")
        return self
