"""What the second paper's recipes learn from and are measured on: read, or refused before they start."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from for_ray.config import FinetuneSettings
from for_ray.datasets.captions import PAIR_FORMS, CaptionedImages, open_captioned
from for_ray.datasets.classes import ClassImages, no_pair
from for_ray.datasets.labelled import Ragged
from for_ray.datasets.spec import FORMS, open_dataset
from for_ray.errors import ConfigError, DataError
from for_ray.model.bundle import Bundle
from for_ray.model.encoder_config import EncoderConfig
from for_ray.model.text import fill
from for_ray.stages.caption_table import CaptionRun, CaptionTable, read_record, read_table
from for_ray.stages.tower_val import TowerVal
from for_ray.stages.training_images import TrainingImages
from for_ray.storage import canonical_uri

Say = Callable[[str], None]
"""Tells a person one line."""

NUM_LOOKED_AT = 32
"""Images of a set that are opened before the workers start."""

WHEN_MEASURED = "measured before the first epoch, and after each"


class TowerSet(NamedTuple):
    """What messages call the images, and what they are trained with.

    Attributes:
        name: Of the data set.
        images: With one label each, but for `realign`.
        num_classes: V.
        of_image: The captions of each image.
        vectors: Of the captions; `mcip` alone.
        texts: The captions; `realign` alone.
    """

    name: str
    images: TrainingImages
    num_classes: int
    of_image: Ragged
    vectors: NDArray[np.float16] | None = None
    texts: tuple[str, ...] = ()


def settle_captions(settings: FinetuneSettings) -> FinetuneSettings:
    """The settings with what is in force for the pseudo-captions: where nothing is set, the table's own.

    Args:
        settings: The job's.

    Raises:
        ConfigError: More captions are wanted than the table was made with.
        DataError: There is no table.
        StorageError: The store refused.
    """
    if settings.captions is None:
        return settings
    taken = _taken(settings, read_record(canonical_uri(settings.captions)))
    return settings.model_copy(
        update={"caption_threshold": taken.threshold, "captions_per_image": taken.most}
    )


class _Taken(NamedTuple):
    """Which captions of a table are taken: those of a cosine at least so high, and so many of an image."""

    threshold: float
    most: int


def _taken(settings: FinetuneSettings, run: CaptionRun) -> _Taken:
    """As it is set, else as the table was made; what was left out of that is not to be had."""
    threshold, most = settings.caption_threshold, settings.captions_per_image
    wanted = []
    if threshold is not None and threshold < run.threshold:
        wanted.append(f"--caption-threshold {threshold} is below the --threshold {run.threshold}")
    if most is not None and most > run.most:
        wanted.append(f"--captions-per-image {most} is above the {run.most}")
    if wanted:
        raise ConfigError(
            f"{' and '.join(wanted)} that {settings.captions} was made with: leave it out, or make another "
            "table by jobs/pseudo_caption.py"
        )
    return _Taken(run.threshold if threshold is None else threshold, run.most if most is None else most)


def read_set(settings: FinetuneSettings, bundle: Bundle, say: Say) -> TowerSet:
    """What a recipe learns from; no image is touched.

    Args:
        settings: The job's, as `settle_captions` made them; its recipe is not `for`.
        bundle: The encoder that it begins with.
        say: Told what is there, and what is left out.

    Raises:
        ConfigError: The data set, or the pseudo-captions, are of another kind or encoder.
        DataError: There is too little to learn from, or the files are not what they should be.
        StorageError: The store refused.
    """
    if settings.recipe == "realign":
        return _read_pairs(settings, say)
    return _read_classes(settings, bundle, say)


def read_val(settings: FinetuneSettings, bundle: Bundle, say: Say) -> TowerVal | None:
    """What each epoch is measured on, None where nothing was asked for; no image is touched.

    Args:
        settings: The job's; its recipe is not `for`.
        bundle: The encoder that it begins with.
        say: Told what is there, and what is left out.

    Raises:
        ConfigError: The data set is of another kind than the recipe is measured by.
        DataError: There is too little to measure, or the files are not what they should be.
        StorageError: The store refused.
    """
    if settings.val is None:
        return None
    kind = settings.val.partition(":")[0]
    if settings.recipe == "realign":
        if kind in FORMS and kind != "picturebook":
            raise ConfigError(
                f"--val {kind}:… has classes, and recipe realign is measured by captions: take {PAIR_FORMS}"
            )
        return _val_of_pairs(open_captioned(settings.val), say)
    if kind == "pairs":
        raise ConfigError(
            f"--val pairs:… has captions, and recipe {settings.recipe} is measured by classes: take "
            f"{FORMS['folder']} or {FORMS['labels']}"
        )
    dataset = open_dataset(settings.val, split=settings.val_split or settings.split)
    return _val_of_classes(ClassImages.of(dataset, why="--val"), bundle.config.prompts, say)


def look_at_some(name: str, images: TrainingImages, config: EncoderConfig, say: Say) -> None:
    """Open some of the images of a set: an epoch is late to find out that they lie elsewhere.

    Args:
        name: What messages call the set.
        images: That have uris.
        config: How pixels reach the model.
        say: Told of those that cannot be read.

    Raises:
        DataError: None of those that were looked at can be read.
        StorageError: The store refused.
    """
    from for_ray.stages.training_images import look_at

    looked = look_at(images, config, most=NUM_LOOKED_AT)
    if not looked.problems:
        return
    num_bad, worst = len(looked.problems), looked.problems[0]
    found = f"{num_bad} of {looked.num_images} images of {name} that were looked at cannot be read: {worst}"
    if num_bad == looked.num_images:
        raise DataError(found)
    say(f"{found}; an epoch tells of all")


def _val_of_classes(found: ClassImages, prompts: tuple[str, ...], say: Say) -> TowerVal:
    if not found.has_pair:
        raise DataError(f"--val: {no_pair(found.name)}: add more images of a class")
    for name in found.names:
        try:
            fill(prompts, name)
        except ConfigError as error:
            raise DataError(
                f"--val: a class of {found.name} is called {name!r}, which no prompt can ask for: rename it"
            ) from error
    counts = np.bincount(found.classes)
    say(
        f"--val {found.name}: {len(found.classes):,} images of {int((counts > 0).sum()):,} classes, "
        f"{int((counts == 1).sum()):,} with one image; {found.num_bare:,} images without a class are left "
        f"out; {WHEN_MEASURED}"
    )
    of_image = Ragged(np.arange(len(found.classes) + 1), found.classes.astype(np.int32))
    return TowerVal(found.name, _strings(found.uris), found.names, of_image)


def _val_of_pairs(found: CaptionedImages, say: Say) -> TowerVal:
    if len(found) < 2:
        raise DataError(f"--val: {found.name} has one image, which any caption finds: add others")
    say(f"--val {found.describe()}; {WHEN_MEASURED}")
    return TowerVal(found.name, _strings(found.uris), found.captions.texts, found.of_image)


def _strings(uris: pa.ChunkedArray) -> pa.Array:
    return pa.chunked_array(uris).combine_chunks().cast(pa.string())


def _read_classes(settings: FinetuneSettings, bundle: Bundle, say: Say) -> TowerSet:
    dataset = open_dataset(settings.dataset, split=settings.split)
    found = ClassImages.of(dataset, why=f"--recipe {settings.recipe}")
    uris, num_images = _strings(found.uris), len(found.classes)
    names, classes = np.unique(found.classes, return_inverse=True)
    num_alone = int((np.bincount(classes) == 1).sum())
    say(
        f"{found.name}: {num_images:,} images of {len(names):,} classes, {num_alone:,} with one image; "
        f"{found.num_bare:,} images without a class are left out"
    )
    images = TrainingImages(Ragged.of([[label] for label in classes]), np.ones(num_images, bool), uris=uris)
    of_image, vectors = Ragged.empty(num_images), None
    if settings.captions is not None:
        table = _read_captions(settings.captions, bundle)
        taken = _Taken(cast("float", settings.caption_threshold), cast("int", settings.captions_per_image))
        asked = uris.to_pylist()
        of_image = table.nearest(asked, threshold=taken.threshold, most=taken.most)
        vectors = table.vectors
        _tell_captions(settings.captions, taken, of_image, table.holds(asked), say)
    return TowerSet(found.name, images, len(names), of_image, vectors)


def _read_captions(output: str, bundle: Bundle) -> CaptionTable:
    table = read_table(output)
    if table.vectors.shape[1] != bundle.dim:
        raise ConfigError(
            f"the pseudo-captions at {output} are of an encoder of dimension {table.vectors.shape[1]} "
            f"({table.run.encoder}), this one's is {bundle.dim}: compare them with this one"
        )
    if table.run.fingerprint != bundle.fingerprint:
        raise ConfigError(
            f"the pseudo-captions at {output} were compared by another encoder ({table.run.encoder}), "
            f"or at another image size, than {bundle.name} at {bundle.image_size} pixels: give "
            "--encoder and --image-size of then, or compare them with these"
        )
    return table


def _tell_captions(
    output: str, taken: _Taken, of_image: Ragged, is_held: NDArray[np.bool_], say: Say
) -> None:
    """Say how many captions the images have; refuse none at all, and those of other images."""
    if not is_held.any():
        raise DataError(
            f"{output} was made for other images: none of these {len(is_held):,} is in it; run "
            "jobs/pseudo_caption.py with this --dataset"
        )
    lengths = np.diff(of_image.offsets)
    if not lengths.any():
        raise DataError(
            f"no image has a pseudo-caption of cosine {taken.threshold} or more in {output}: lower "
            "--caption-threshold, and --threshold of jobs/pseudo_caption.py, or take --recipe gpr"
        )
    num_bare = int((lengths[is_held] == 0).sum())
    say(
        f"pseudo-captions: {lengths.mean():.1f} an image, {taken.most} at most, {num_bare:,} images without "
        f"one over {taken.threshold}, {int((~is_held).sum()):,} that are not in {output}: the loss on "
        "captions leaves these out"
    )


def _read_pairs(settings: FinetuneSettings, say: Say) -> TowerSet:
    dataset = open_captioned(settings.dataset)
    say(dataset.describe())
    images = TrainingImages(
        Ragged.empty(len(dataset)), np.ones(len(dataset), bool), uris=_strings(dataset.uris)
    )
    return TowerSet(dataset.name, images, 0, dataset.of_image, texts=dataset.captions.texts)
