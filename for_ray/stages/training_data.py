"""From a labelled data set, and the table of its pseudo-labels, to the images of a training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from for_ray.datasets.labelled import LabelledImages, Ragged
from for_ray.datasets.sampling import below, pick_share, relative_names
from for_ray.errors import DataError
from for_ray.index.labels import read_label_run
from for_ray.index.table import require_table, scan_state, take_rows
from for_ray.schema import LabelLayout, LabelRun
from for_ray.stages.training_images import TrainingImages, ragged_of
from for_ray.storage import exists


@dataclass(frozen=True)
class LabelTable:
    """An opened table of pseudo-labels."""

    layout: LabelLayout
    run: LabelRun
    table: Any


class Found(NamedTuple):
    """The images of a data set that can be read, and how many cannot: without a row, or with an error."""

    images: TrainingImages
    names: list[str]
    num_missing: int


class Parts(NamedTuple):
    """The images to train on, those kept from it (None: none), and the pseudo-labels of the latter."""

    train: TrainingImages
    held_out: TrainingImages | None
    held_out_pseudo: Ragged | None


def open_labels(labels_uri: str) -> LabelTable:
    """What `jobs/pseudo_label.py` wrote to a folder or prefix.

    Raises:
        DataError: Nothing, or not to its end.
        StorageError: The store refused.
    """
    layout = LabelLayout(labels_uri)
    run = read_label_run(layout)
    if run is None:
        raise DataError(f"no pseudo-labels at {labels_uri}: run jobs/pseudo_label.py --output {labels_uri}")
    if not exists(layout.report_uri):
        raise DataError(f"the pseudo-labels at {labels_uri} are not complete: run jobs/pseudo_label.py again")
    return LabelTable(layout, run, require_table(layout.table_uri))


def find_images(
    dataset: LabelledImages,
    labels: LabelTable | None,
    *,
    num_categories: int,
    with_features: bool = True,
    max_bad_fraction: float = 0.05,
) -> Found:
    """The images of a data set, with their labels, as rows of the table.

    Args:
        dataset: The data set.
        labels: Its table; None where there is none: every image then counts as found.
        num_categories: Labels from here on are left out: the base categories come first.
        with_features: Use the table's features, where it has any.
        max_bad_fraction: More that cannot be read are refused.

    Raises:
        DataError: Too many images have no row, or a row with an error.
    """
    categories, names = below(dataset.labels, num_categories), relative_names(dataset)
    images = TrainingImages(categories, np.ones(len(dataset), bool), negatives=dataset.negatives)
    uris = pc.cast(pa.chunked_array(dataset.uris), pa.string())
    if labels is None:
        return Found(replace(images, uris=uris.combine_chunks()), names, 0)
    rows = pa.Table.from_batches(scan_state(labels.table))
    rows = rows.filter(pc.is_null(rows["error"]))
    at = pc.index_in(uris, rows["uri"].cast(pa.string()).combine_chunks())
    found = np.flatnonzero(pc.is_valid(at).to_numpy())
    num_missing = len(dataset) - len(found)
    if not len(found) or num_missing > max_bad_fraction * len(dataset):
        raise DataError(
            f"{num_missing:,} of the {len(dataset):,} images of {dataset.name} are not in the table of "
            f"pseudo-labels {labels.layout.output_uri}, or unreadable; at most {max_bad_fraction:.0%} may be "
            "(--max-bad-fraction). Is it the table of this data set?"
        )
    at = at.drop_null()
    images = replace(
        images.select(found),
        table_uri=labels.layout.table_uri,
        table_version=int(labels.table.version),
        row_ids=rows["_rowid"].take(at).to_numpy().astype(np.int64),
        run=labels.run,
        content=_content(labels.table, rows.take(at)),
    )
    if not (labels.run.has_features and with_features):
        images = replace(
            images, **{f"{name}s": rows[name].take(at).combine_chunks() for name in ("uri", "etag")}
        )
    return Found(images, [names[row] for row in found], num_missing)


def part_images(
    found: Found,
    labels: LabelTable | None,
    *,
    held_out: float,
    labelled_fraction: float,
    fold: int,
    labelled_only: bool = False,
) -> Parts:
    """Keep images from the training, and labels from images, by hashes of the images' names.

    Labels beyond the labelled fraction are gone: neither training nor measure sees them.

    Args:
        found: The images.
        labels: Their table.
        held_out: Share that is kept from the training.
        labelled_fraction: Share whose labels are known.
        fold: Another fold knows the labels of other images.
        labelled_only: Leave out of the training what has no labels: without pseudo-labels it teaches nothing.
    """
    is_known = pick_share(found.names, labelled_fraction, key=f"labelled {fold}")
    images = replace(found.images, is_labelled=is_known, labels=_only(found.images.labels, is_known))
    is_held_out = pick_share(found.names, held_out, key="held out")
    is_trained_on = ~is_held_out & is_known if labelled_only else ~is_held_out
    train, kept = images.select(np.flatnonzero(is_trained_on)), np.flatnonzero(is_held_out)
    if not len(kept):
        return Parts(train, None, None)
    pseudo = None
    if labels is not None and images.row_ids is not None:
        pseudo = ragged_of(take_rows(labels.table, images.row_ids[kept], ["labels"])["labels"])
    return Parts(train, images.select(kept), pseudo)


def digest(sets: Iterable[TrainingImages | None]) -> str:
    """A hash of which images, labels and tables these are: 64 hex digits."""
    found = hashlib.sha256()
    for images in sets:
        found.update(b"|")
        if images is None:
            continue
        for lists in (images.labels, images.negatives):
            for part in (lists.offsets, lists.values) if lists is not None else ():
                found.update(part.tobytes())
        found.update(images.is_labelled.tobytes())
        if images.row_ids is not None and images.run is not None:
            found.update(images.row_ids.tobytes() + images.run.model_dump_json().encode())
        found.update(images.content.encode())
        if images.uris is not None:
            found.update("\n".join(images.uris.to_pylist()).encode())
    return found.hexdigest()


def _content(table: Any, rows: pa.Table) -> str:
    """A hash of the images' etags, and of the names of the table's files, which are never given twice."""
    found = hashlib.sha256(json.dumps(rows["etag"].to_pylist()).encode())
    for fragment in table.get_fragments():
        found.update(" ".join(file.path for file in fragment.data_files()).encode())
    return found.hexdigest()


def _only(lists: Ragged, is_kept: np.ndarray) -> Ragged:
    """The lists, empty where they are not kept."""
    lengths = np.diff(lists.offsets)
    offsets = np.concatenate([[0], np.cumsum(np.where(is_kept, lengths, 0))]).astype(np.int64)
    return Ragged(offsets, lists.values[np.repeat(is_kept, lengths)])
