"""The settings of `jobs/finetune.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from for_ray.config.reading import Preset, Settings

Losses = Literal["sup,pse", "sup", "pse"]
TrainedHead = Literal["sum", "clip", "dense"]
Freeze = Literal["qkvo", "vo", "none"]
Objective = Literal["rank", "set"]
Precision = Literal["auto", "float32", "float16", "bfloat16"]
Recipe = Literal["for", "gpr", "realign", "mcip"]

TOWER_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpr": {"lr": 1e-6, "epochs": 3, "batch_size": 128, "weight_decay": 1e-2},
    "mcip": {"lr": 1e-6, "epochs": 3, "batch_size": 128, "weight_decay": 1e-2},
    "realign": {"lr": 1e-5, "epochs": 3, "batch_size": 1024, "weight_decay": 1e-2},
}
"""What the recipes of towers train with, where it differs from the defaults.

The second paper's are all four numbers of `mcip` (with half a cosine to a tenth of lr), and lr of `realign`.
Ours are those of `gpr`, which are taken from `mcip`, and the rest of `realign`, of which the paper says that
its batches are large.
"""

CLASS_FIELDS = frozenset({"proxies_lr_factor", "scale", "margin"})
"""Settings of the recipes that learn classes, `gpr` and `mcip`."""

CAPTION_FIELDS = frozenset({"gamma_classes", "gamma_captions", "captions_per_image", "caption_threshold"})
"""Settings of recipe `mcip` alone, besides `captions`, of which there is more to say."""

TOWER_FIELDS = (
    CLASS_FIELDS
    | CAPTION_FIELDS
    | frozenset({"captions", "tune_blocks", "tune_projection", "lr_end", "grad_checkpointing"})
)
"""Settings of the second paper's recipes alone."""

HEAD_FIELDS = frozenset(
    {
        *("labels", "preset", "losses", "objective", "labelled_fraction", "fold", "head", "freeze", "layers"),
        *("slots", "feedforward", "dropout", "mean_token", "lr_schedule", "lr_drop_epoch", "warmup_steps"),
        *("gamma_sup", "gamma_pse", "null_weight", "val_labels", "held_out", "select"),
    }
)
"""Settings of recipe `for` alone."""

REFUSED: dict[str, frozenset[str]] = {
    "for": TOWER_FIELDS,
    "gpr": HEAD_FIELDS | CAPTION_FIELDS,
    "mcip": HEAD_FIELDS,
    "realign": HEAD_FIELDS | CAPTION_FIELDS | CLASS_FIELDS,
}
"""For each recipe the settings of others, which would change nothing."""


class FinetuneSettings(Settings):
    """Train a head that gives an image many vectors, on labels and pseudo-labels; the result is an encoder.

    Other recipes tune CLIP's towers, and an image keeps one vector: gpr the image tower, on classes
    (ArcMargin); mcip the same, and on pseudo-captions (MCArcMargin), which keeps it near the texts; realign
    the text tower, on image-caption pairs, with the image tower locked. Their --dataset has one class an
    image, or for realign captions; --encoder is what they begin with, so that they follow one another.

    Settings come from flags over FOR_RAY_… variables over the --config file over the --preset over the
    defaults. Exit code 0: done, or done before; 2: the settings, the data or the store are at fault; 1: the
    training failed (run again: it goes on from the last epoch); 130: interrupted; 143: ended by SIGTERM.
    """

    recipe: Recipe = Field(
        "for",
        description="for: a head on the frozen backbone; gpr, mcip, realign: CLIP's towers (second paper)",
    )
    dataset: str = Field(
        min_length=1,
        description="labelled images to train on: coco:ANNOTATIONS.json:IMAGES, "
        "lvis:ANNOTATIONS.json:IMAGES, nuimages:ROOT:VERSION, picturebook:DIR, folder:DIR or labels:FILE "
        "(uri, label); for recipe realign pairs:FILE (uri, caption) or picturebook:DIR",
    )
    split: str | None = Field(
        None,
        min_length=1,
        description='a file {"base": […], "novel": […]}; only base labels are trained on. Default: the data '
        "set's own",
    )
    encoder: str | None = Field(
        None,
        min_length=1,
        description="the CLIP to build on: a bundle, or open_clip:MODEL@PRETRAINED. Default: that of "
        "--labels, else `picturebook`",
    )
    labels: str | None = Field(
        None,
        min_length=1,
        description="what jobs/pseudo_label.py wrote for these images: pseudo-labels, and features if it "
        "kept them, so that the backbone need not run again",
    )
    output: str = Field(min_length=1, description="a folder or s3://bucket/prefix for checkpoints and bundle")
    preset: Preset | None = Field(
        None,
        description="the paper's settings for a data set (Table 8); `paper`: its recipe for any; "
        "`picturebook`: what suits the tiny bundled encoder",
    )
    losses: Losses = Field("sup,pse", description="on the labels (sup), on pseudo-labels (pse), or both")
    objective: Objective = Field(
        "rank",
        description="rank: a softmax over the images of a batch, for each name, with soft pseudo-labels, "
        "from windows of the frozen feature map; set: the paper's, over the names, for each slot",
    )
    labelled_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the images whose labels are used; the rest has pseudo-labels only",
    )
    fold: int = Field(0, ge=0, description="which share of the images that is")
    head: TrainedHead = Field("sum", description="what is trained: slots, or CLIP's own or dense pooling")
    freeze: Freeze | None = Field(
        None,
        description="layers of the pooling attention that stay as they are: query, key, value, output. "
        "Default: none, and qkvo for head sum with objective set or where the pooling is no ResNet's",
    )
    layers: int = Field(2, ge=0, le=12, description="decoder layers of head sum")
    slots: int = Field(50, ge=1, le=256, description="vectors of an image with head sum")
    feedforward: int = Field(2048, ge=1, le=65536, description="hidden width of the decoder's feed-forward")
    dropout: float = Field(0.1, ge=0, lt=1, description="of the decoder layers")
    mean_token: bool = Field(False, description="head sum: the mean token among the keys of the pooling")
    image_size: int | None = Field(
        None, ge=32, le=4096, description="side of the model's input in pixels; default: the encoder's"
    )
    epochs: int = Field(25, ge=1, le=10_000, description="passes over the images")
    lr: float = Field(1e-5, gt=0, le=1, description="learning rate of Adam")
    lr_schedule: Literal["cosine", "step"] = Field(
        "cosine", description="the learning rate falls along half a cosine, or once"
    )
    lr_drop_epoch: int | None = Field(
        15, ge=1, description="lr_schedule step: after this many epochs the learning rate is a tenth"
    )
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises to its value")
    batch_size: int = Field(64, ge=1, le=65536, description="images of a step, over all workers")
    weight_decay: float = Field(1e-4, ge=0, le=1, description="of Adam")
    gamma_sup: float | None = Field(
        None, ge=0, le=1e4, description="weight of the loss on labels; default: 0.1, with objective set 1"
    )
    gamma_pse: float = Field(1.0, ge=0, le=1e4, description="weight of the loss on pseudo-labels")
    null_weight: float = Field(
        0.1, ge=0, le=1, description="objective set: weight of a slot without a label; 0: no ∅ at all"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of weights, order and dropout")
    val: str | None = Field(
        None,
        min_length=1,
        description="a data set to measure on after each epoch, as --dataset: mAP@50; gpr, mcip: "
        "image-to-image and zero-shot, and realign text-to-image, before the first epoch, too. It chooses "
        "no epoch: gpr, mcip and realign keep the last. These compare all its images with each other, or "
        "with all its captions, each time: take some thousands, some ten thousand at most",
    )
    val_split: str | None = Field(None, min_length=1, description="the split of --val; default: --split")
    val_labels: str | None = Field(
        None, min_length=1, description="what jobs/pseudo_label.py wrote for --val: its features are used"
    )
    captions: str | None = Field(
        None, min_length=1, description="recipe mcip: what jobs/pseudo_caption.py wrote for these images"
    )
    tune_blocks: int | None = Field(
        None, ge=1, description="recipes gpr, mcip: the last blocks of the image tower; default: all of it"
    )
    tune_projection: bool | None = Field(
        None,
        description="recipes gpr, mcip: train the projection to the joint space, too; default: mcip does",
    )
    grad_checkpointing: bool = Field(
        False,
        description="recipes of towers: keep what each block of a transformer begins with, and compute the "
        "rest again for the gradients: a tenth of the memory of activations for a third more computing, and "
        "the same result. Take it where a GPU's memory is short (ViT-L/14-336 keeps half a GB an image "
        "without); for --batch-size is over all --workers, a GPU each, more of these help, too",
    )
    lr_end: float | None = Field(
        None, ge=0, le=1, description="recipes of towers: the last learning rate; default: a tenth of lr"
    )
    proxies_lr_factor: float = Field(
        100.0, gt=0, le=1e6, description="recipes gpr, mcip: the proxies' learning rate in units of lr"
    )
    scale: float = Field(30.0, gt=0, le=1000, description="recipes gpr, mcip: s of the margin losses")
    margin: float = Field(
        0.1, ge=0, lt=3.14, description="recipes gpr, mcip: m of the margin losses, radians"
    )
    gamma_classes: float = Field(0.5, ge=0, le=1e4, description="recipe mcip: weight of the loss on classes")
    gamma_captions: float = Field(
        0.5, ge=0, le=1e4, description="recipe mcip: weight of the loss on pseudo-captions"
    )
    captions_per_image: int | None = Field(
        None, ge=1, le=1000, description="recipe mcip: its nearest, at most; default: all in --captions"
    )
    caption_threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="recipe mcip: captions with a lower cosine do not count; default: that of --captions",
    )
    held_out: float = Field(
        0.05, ge=0, le=0.5, description="share of --dataset kept from training, to measure each epoch by"
    )
    select: Literal["best", "last"] = Field(
        "last", description="which epoch becomes the bundle; best: by the held-out images, never by --val"
    )
    workers: int = Field(
        1, ge=1, le=1024, description="processes that train together, a GPU each if there are"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where it is trained: auto takes the GPUs that are there, cuda waits for some"
    )
    precision: Precision = Field(
        "auto", description="of the computation; auto: bfloat16 or float16 on a GPU, float32 on a CPU"
    )
    read_threads: int = Field(
        16, ge=1, le=256, description="images that a worker reads at once where there are no features"
    )
    max_bad_fraction: float = Field(
        0.05, ge=0, le=1, description="share of the images that may be missing or unreadable, of --val, too"
    )
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._-]{1,80}$", description="what the encoder is called; default: its origin"
    )
    config: Path | None = Field(None, description="a TOML file with any of these settings")
    json_: bool = Field(
        False, alias="json", description="print one line of JSON as the last line of the output"
    )

    @model_validator(mode="before")
    @classmethod
    def _recipes_have_defaults(cls, given: Any) -> Any:
        """What is not given is as the recipe's paper has it; a setting of another recipe is refused."""
        if not isinstance(given, dict):
            return given
        recipe = str(given.get("recipe", "for"))
        if other := sorted(REFUSED.get(recipe, frozenset()) & set(given)):
            named = ", ".join(f"--{name.replace('_', '-')}" for name in other)
            raise ValueError(f"{named}: not a setting of recipe {recipe}")
        return TOWER_DEFAULTS.get(recipe, {}) | given

    @property
    def has_sup(self) -> bool:
        """Whether labels are trained on."""
        return "sup" in self.losses

    @property
    def has_pse(self) -> bool:
        """Whether pseudo-labels are trained on."""
        return "pse" in self.losses

    @model_validator(mode="after")
    def _goes_together(self) -> FinetuneSettings:
        if self.recipe != "for":
            return self._tower_goes_together()
        if self.has_pse and self.labels is None:
            raise ValueError(
                f"losses {self.losses} needs --labels, which jobs/pseudo_label.py writes; else take --losses "
                "sup"
            )
        if self.select == "best" and not self.held_out:
            raise ValueError("select best needs --held-out above 0")
        if (self.head, self.freeze) in {("clip", "qkvo"), ("dense", "qkvo"), ("dense", "vo")}:
            raise ValueError(f"freeze {self.freeze} leaves head {self.head} nothing to train: take none")
        if self.val is None and (self.val_labels or self.val_split):
            raise ValueError("--val-labels and --val-split go with --val")
        if self.workers > self.batch_size:
            raise ValueError(f"a batch of {self.batch_size} does not go round {self.workers} workers")
        return self

    def _tower_goes_together(self) -> FinetuneSettings:
        if (self.recipe == "mcip") != (self.captions is not None):
            raise ValueError("recipe mcip, and it alone, needs --captions: what jobs/pseudo_caption.py wrote")
        if self.recipe == "realign" and (self.tune_blocks or self.tune_projection is not None):
            raise ValueError("recipe realign locks the image tower: leave --tune-blocks and -projection out")
        if self.recipe == "realign" and (self.split or self.val_split):
            raise ValueError("--split and --val-split go with classes: recipe realign has captions")
        if self.val is None and self.val_split:
            raise ValueError("--val-split goes with --val")
        if self.lr_end is not None and self.lr_end > self.lr:
            raise ValueError(f"lr_end ({self.lr_end}) is above lr ({self.lr})")
        if self.workers > self.batch_size:
            raise ValueError(f"a batch of {self.batch_size} does not go round {self.workers} workers")
        return self
