"""The images of a data set as they lie in the store: a listing of what its annotations name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from for_ray.datasets.labelled import LabelledImages
from for_ray.errors import DataError
from for_ray.schema import LISTING_SCHEMA
from for_ray.stages.listing import write_listing
from for_ray.storage import Spill, shown


@dataclass(frozen=True)
class DatasetImages:
    """What of a data set is there.

    Attributes:
        rows: Its images, `LISTING_SCHEMA`, on this disk.
        num_missing: Images that it names and that are not where they should be.
    """

    rows: Spill
    num_missing: int


def list_dataset(
    dataset: LabelledImages,
    folder: Path,
    *,
    most_missing: float,
    progress: Callable[[int], None] = lambda _: None,
) -> DatasetImages:
    """List the folder or prefix of a data set's images, and keep those that it names.

    Args:
        dataset: The data set.
        folder: For this alone, on this disk; the caller removes it.
        most_missing: The share of its images that may be missing.
        progress: Called with the number of objects that were listed so far.

    Raises:
        DataError: More images are missing, or all of them.
        StorageError: The folder or bucket is missing, or the store refused.
    """
    listing = write_listing(dataset.images_uri, folder / "all", progress=progress)
    rows = Spill(folder / "named", LISTING_SCHEMA)
    for number in range(listing.rows.num_parts):
        part = listing.rows.part(number).select(LISTING_SCHEMA.names)
        for batch in part.filter(pc.is_in(part["uri"], value_set=dataset.uris)).to_batches():
            rows.add(batch)
    rows.finish()
    num_missing = len(dataset) - rows.num_rows
    if num_missing > most_missing * len(dataset) or not rows.num_rows:
        raise DataError(
            f"{num_missing:,} of the {len(dataset):,} images of {dataset.name} are missing, such as "
            f"{shown(_first_missing(dataset, rows))}: more than max_bad_fraction {most_missing:g}; check "
            "where the images lie, or raise it"
        )
    return DatasetImages(rows, num_missing)


def _first_missing(dataset: LabelledImages, rows: Spill) -> str:
    is_there = np.zeros(len(dataset), bool)
    for number in range(rows.num_parts):
        is_there |= pc.is_in(dataset.uris, value_set=rows.part(number)["uri"]).to_numpy()
    return str(dataset.uris[int(np.argmin(is_there))].as_py())
