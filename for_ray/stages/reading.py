"""Reading a block of images: each object is fetched, bound to its etag, and decoded into pixels.

What a row can't be blamed for (the network, the credentials) is raised, or the row is passed over and tried
again by the next run; what it can, such as a uri that no object can have, becomes its `error`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from for_ray.errors import ConfigError, DataError, ForRayError, StorageError
from for_ray.model.preprocess import decode
from for_ray.stages.apart import Apart, Decode
from for_ray.stages.blocks import CHANGED, DENIED, GONE, OK, ImageJob
from for_ray.storage import (
    NoBucket,
    NotAnObject,
    ObjectChanged,
    ObjectDenied,
    ObjectGone,
    list_objects,
    read_image,
)

_NO_BUCKET = -1
"""The `status` of a row whose bucket does not exist, until it is known whether others can be read."""


def read_block(block: pa.Table, *, job: ImageJob, is_apart: bool = False) -> pa.Table:
    """Fetch and decode a block of the gap.

    Args:
        block: `LISTING_SCHEMA` and metadata columns.
        job: The job.
        is_apart: Decode in a child process: slower, but an image that kills its process is quarantined.

    Returns:
        The same rows with `width`, `height`, `error`, `status` and `pixels` [3 * S * S] uint8; the rows that
        have pixels come first, so that the encoder sees them in one piece.

    Raises:
        StorageError: The store refused all of several rows and to list where they lie, or the network failed
            again and again.
    """
    size = job.image_size
    pixels = np.zeros((block.num_rows, 3, size, size), np.uint8)
    uris = block["uri"].to_pylist()
    rows = zip(range(block.num_rows), uris, block["etag"].to_pylist(), strict=True)
    num_threads = min(job.read_threads, max(block.num_rows, 1))
    with _decoder(job, is_apart=is_apart) as decode_with, ThreadPoolExecutor(num_threads) as pool:
        outcomes = list(pool.map(partial(_read_row, pixels=pixels, decode_with=decode_with), rows))
    outcomes = _with_denied(outcomes, uris)
    columns = list(zip(*outcomes, strict=True)) or [(), (), (), ()]
    for name, kind, values in zip(_READ_COLUMNS, _READ_COLUMNS.values(), columns, strict=True):
        block = block.append_column(name, pa.array(values, kind))
    has_pixels = np.asarray(pc.is_valid(block["width"]))
    if not has_pixels.all():
        order = np.argsort(~has_pixels, kind="stable")
        block, pixels = block.take(order), pixels[order]
    flat = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 3 * size * size)
    return block.append_column("pixels", flat)


_READ_COLUMNS = {"width": pa.int32(), "height": pa.int32(), "error": pa.string(), "status": pa.int8()}

_Outcome = tuple[int | None, int | None, str | None, int]


@contextmanager
def _decoder(job: ImageJob, *, is_apart: bool) -> Iterator[Decode]:
    here = partial(
        decode, image_size=job.image_size, resize_mode=job.resize_mode, interpolation=job.interpolation
    )
    if not is_apart:
        yield here
        return
    with Apart(here) as there:
        yield there.decode


def _read_row(row: tuple[int, str, str], *, pixels: NDArray[np.uint8], decode_with: Decode) -> _Outcome:
    position, uri, etag = row
    try:
        decoded = decode_with(read_image(uri, etag))
    except ObjectGone:
        return None, None, None, GONE
    except ObjectChanged:
        return None, None, None, CHANGED
    except ObjectDenied as error:
        return None, None, str(error), DENIED
    except NoBucket as error:
        return None, None, str(error), _NO_BUCKET
    except (ConfigError, DataError, NotAnObject) as error:  # the first where the uri names no place
        return None, None, str(error), OK
    pixels[position] = decoded.pixels
    return decoded.width, decoded.height, None, OK


def _with_denied(outcomes: list[_Outcome], uris: list[str]) -> list[_Outcome]:
    """What may not be read is quarantined beside what may; where nothing may be, the rows are not to blame.

    Then they are passed over, if there are several: the right to read may be lost and come back, or the store
    be another one. Where not even the place of the first may be listed, it is the credentials' fault.
    """
    statuses = [status for *_, status in outcomes]
    num_denied = statuses.count(DENIED)
    if OK in statuses or num_denied + statuses.count(_NO_BUCKET) < 2:
        return [_quarantined(outcome) for outcome in outcomes]
    if num_denied == len(outcomes) and not _can_list(uris[0].rpartition("/")[0]):
        raise StorageError(outcomes[0][2])
    return [(*outcome[:3], DENIED if outcome[3] == _NO_BUCKET else outcome[3]) for outcome in outcomes]


def _can_list(uri: str) -> bool:
    """Whether a folder, or a prefix, may be listed: on S3, one request."""
    try:
        next(list_objects(uri or "/"), None)
    except ForRayError:
        return False
    return True


def _quarantined(outcome: _Outcome) -> _Outcome:
    """The outcome, stored with its reason where it was not known yet whether others can be read."""
    *_, reason, status = outcome
    if status not in (DENIED, _NO_BUCKET):
        return outcome
    return None, None, f"{reason}; then run with --retry-quarantined", OK
