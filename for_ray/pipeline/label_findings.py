"""What a table of pseudo-labels holds, looked at once from end to end, for its summary and its report."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from for_ray.datasets.labelled import LabelledImages, Ragged
from for_ray.errors import ForRayError
from for_ray.evaluation.labelling import LabelTally, Lists
from for_ray.index.table import scan_labels
from for_ray.reports.labels import CategoryCounts, GroupQuality, LabelFindings
from for_ray.reports.page import Picture, Tag
from for_ray.sheet import thumbnail
from for_ray.storage import read_image

NUM_PICTURES = 24
"""Images that a report shows."""

PICTURE_PIXELS = 240

MOST_TAGS = 12
"""Labels below a picture: the most probable ones."""

READ_THREADS = 8


class Sample(NamedTuple):
    """A labelled image.

    draw: Images with the smallest ones are shown: a hash of the uri, so that it is chance, and stays.
    row: Its place in the data set.
    etag: As it was labelled.
    labels: Indices into the vocabulary, the most probable first.
    probabilities: As many.
    """

    draw: int
    row: int
    etag: str
    labels: list[int]
    probabilities: list[float]


class LookedAt(NamedTuple):
    """The counts over the whole table, and some of its images."""

    tally: LabelTally
    samples: list[Sample]


def look_at_labels(images: Any | None, dataset: LabelledImages, meant: Ragged, *, most: int) -> LookedAt:
    """Count the labels of a table, and draw images of it; memory stays that of a batch.

    Args:
        images: The table; None counts nothing. Rows that the data set does not name are passed over.
        dataset: Knows the truth.
        meant: For each name of the vocabulary the categories that it means.
        most: Labels of an image, at most.
    """
    tally = LabelTally(_lists(meant), len(dataset.categories), most=most)
    samples: list[Sample] = []
    for batch in scan_labels(images) if images is not None else ():
        rows = pc.index_in(batch["uri"], value_set=dataset.uris)
        is_known = pc.is_valid(rows)
        batch, rows = batch.filter(is_known), rows.filter(is_known).to_numpy(zero_copy_only=False)
        labels = batch["labels"]
        offsets = np.concatenate(
            [[0], np.cumsum(pc.list_value_length(labels).to_numpy(zero_copy_only=False))]
        )
        negatives = _lists(dataset.negatives.select(rows)) if dataset.negatives is not None else None
        tally.add(
            Lists(offsets.astype(np.int64), labels.flatten().to_numpy(zero_copy_only=False)),
            _lists(dataset.labels.select(rows)),
            negatives,
        )
        samples = sorted(samples + _draw(batch, rows))[:NUM_PICTURES]
    return LookedAt(tally, samples)


def _lists(ragged: Ragged) -> Lists:
    return Lists(ragged.offsets, ragged.values)


def _draw(batch: pa.RecordBatch, rows: NDArray[np.int64]) -> list[Sample]:
    draws = np.array([zlib.crc32(uri.encode()) for uri in batch["uri"].to_pylist()], np.int64)
    return [
        Sample(
            int(draws[place]),
            int(rows[place]),
            batch["etag"][place].as_py(),
            batch["labels"][place].as_py(),
            batch["probabilities"][place].as_py(),
        )
        for place in np.argsort(draws, kind="stable")[:NUM_PICTURES].tolist()
    ]


def findings_of(
    looked_at: LookedAt,
    dataset: LabelledImages,
    names: Sequence[str],
    meant: Ragged,
    *,
    counts: Sequence[tuple[str, object]],
) -> LabelFindings:
    """What the report shows; reads the images that were drawn.

    Args:
        looked_at: From `look_at_labels`.
        dataset: As there.
        names: The vocabulary.
        meant: As there.
        counts: What stands at the top of the report.
    """
    tally = looked_at.tally
    draw = partial(_picture, dataset=dataset, names=names, meant=meant)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        pictures = list(pool.map(draw, looked_at.samples))
    return LabelFindings(
        counts=counts,
        names=names,
        images_of_name=tally.images_of_name,
        images_with=tally.images_with,
        groups=group_qualities(tally, dataset),
        categories=[
            CategoryCounts(
                name=dataset.categories[index],
                group="novel" if dataset.is_novel[index] else "base",
                shown=int(tally.shown[index]),
                found=int(tally.found[index]),
                right=int(tally.right[index]),
            )
            for index in np.flatnonzero(tally.is_named).tolist()
        ],
        pictures=pictures,
    )


def group_qualities(tally: LabelTally, dataset: LabelledImages) -> list[GroupQuality]:
    """Precision and recall over the base and over the novel categories."""
    qualities = []
    for group, is_in_group in (("base", ~dataset.is_novel), ("novel", dataset.is_novel)):
        precision, recall = tally.precision_recall(is_in_group)
        qualities.append(
            GroupQuality(
                group,
                num_categories=int(is_in_group.sum()),
                num_named=int((is_in_group & tally.is_named).sum()),
                precision=precision,
                recall=recall,
            )
        )
    return qualities


def _picture(sample: Sample, *, dataset: LabelledImages, names: Sequence[str], meant: Ragged) -> Picture:
    uri = dataset.uris[sample.row].as_py()
    shown = set(dataset.labels.row(sample.row).tolist())
    absent = set(range(len(dataset.categories))) - shown
    if dataset.negatives is not None:
        absent = set(dataset.negatives.row(sample.row).tolist())
    tags = []
    for label, probability in zip(sample.labels[:MOST_TAGS], sample.probabilities, strict=False):
        categories = set(meant.row(label).tolist())
        tags.append(
            Tag(
                names[label],
                probability,
                "good" if categories & shown else "bad" if categories & absent else "",
            )
        )
    if len(sample.labels) > MOST_TAGS:
        tags.append(Tag(f"and {len(sample.labels) - MOST_TAGS} more"))
    caption = uri.rsplit("/", 1)[-1]
    try:
        return Picture(caption, tags, jpeg=thumbnail(read_image(uri, sample.etag), PICTURE_PIXELS))
    except ForRayError as error:  # gone or changed since: a report is not lost to one image
        return Picture(caption, tags, problem=str(error))
