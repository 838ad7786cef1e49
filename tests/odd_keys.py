"""Names that break programs, and the round that each of them has to come through whole.

Listed, read, written to the table, compared with it, changed, gone, deleted: under its own uri, once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from for_ray.index import table
from for_ray.model.preprocess import decode
from for_ray.schema import images_schema
from for_ray.stages.blocks import ImageJob
from for_ray.stages.diff import Gap, write_gap
from for_ray.stages.listing import Listing, write_listing
from for_ray.stages.reading import read_block
from for_ray.storage import delete, list_objects, write_bytes
from tests.bad_images import picture, saved

LONG_KEY = "/".join([*("a" * 224 for _ in range(3)), "a" * 221 + ".jpg"])
"""900 characters, in parts that a file system takes."""

LONG_NAME = "k" * 896 + ".jpg"
"""900 characters without a slash: S3 takes them, disks and SeaweedFS don't."""

ODD_KEYS = (
    "a b.jpg",
    " begins and ends with a space /x.jpg",
    "a#b.jpg",
    "a?b&c=d;e,f.jpg",
    "a%2Fb.jpg",
    "a%20b.jpg",
    "a+b.jpg",
    "100%.jpg",
    "caf\u00e9.jpg",
    "cafe\u0301.jpg",
    "画像 \u202eأ.jpg",
    "new\nline.jpg",
    "tab\tand\rreturn.jpg",
    'it\'s "quoted" `so`.jpg',
    "back\\slash.jpg",
    "'; DROP TABLE images; --.jpg",
    "{a}[0-9]*!(~)^|<x>$HOME.jpg",
    "\U0001f984\u200d\U0001f525.jpg",
    "a.tar#b.jpg",
    "a.tar#folder/b.jpg",
    "folder.jpg/b.jpg",
    "-rf.jpg",
    "Case.jpg",
    "case.jpg",
    "x@0+5.jpg",
    "s3:/b/c.jpg",
    LONG_KEY,
)
"""Keys of images; the two of café are the same to the eye (NFC and NFD), and two all the same."""

HIDDEN_KEYS = (".hidden.jpg", ".folder/x.jpg", "deep/.x/y.jpg", "...jpg")
"""Keys that begin with a dot somewhere: not listed."""


def key_image(number: int) -> bytes:
    """The image that lies at `ODD_KEYS[number]`: each another one."""
    return saved(picture(seed=number + 1), "PNG")


SIDE, DIM = 32, 4


def make_job() -> ImageJob:
    """What reading has to know; nothing encodes."""
    return ImageJob(
        bundle_uri="",
        image_size=SIDE,
        resize_mode="squash",
        interpolation="bicubic",
        device="cpu",
        batch_size=8,
        read_threads=4,
    )


def put_keys(root: str, keys: tuple[str, ...], hidden: tuple[str, ...] = HIDDEN_KEYS) -> list[str]:
    """Write `key_image(i)` under each key, and something under each hidden one; the uris."""
    for number, key in enumerate(keys):
        write_bytes(f"{root}/{key}", key_image(number))
    for key in hidden:
        write_bytes(f"{root}/{key}", b"hidden")
    return [f"{root}/{key}" for key in keys]


def check_round(root: str, keys: tuple[str, ...], table_uri: str, folder: Path) -> None:
    """Take keys through all stages but the encoder; the store holds nothing below `root` before and after."""
    uris = put_keys(root, keys)
    listing = write_listing(root, folder / "rows-0")
    listed = sorted(row["uri"] for row in rows_of(listing))
    assert listed == sorted(uris)
    assert listing.num_ignored == len(HIDDEN_KEYS)
    _check_pixels(listing, uris)
    images = _write_table(listing, table_uri)
    assert sorted(images.to_table(columns=["uri"])["uri"].to_pylist()) == listed
    again = write_listing(root, folder / "rows-1")
    assert _counts(_gap(again, images, folder / "gap-1")) == (0, 0, 0, len(keys))
    changed, gone = uris[0::3], uris[1::3]
    for uri in changed:
        write_bytes(uri, b"replaced")
    for uri in gone:
        delete(uri)
    gap = _gap(write_listing(root, folder / "rows-2"), images, folder / "gap-2")
    assert _counts(gap) == (0, len(changed), len(gone), len(keys) - len(changed) - len(gone))
    for ids, expected in ((gap.changed_image_ids(), changed), (gap.gone_image_ids(), gone)):
        taken = table.take_rows(images, np.concatenate(list(ids)), ["uri"])
        assert sorted(taken["uri"].to_pylist()) == sorted(expected)
    for uri in {*uris, *(f"{root}/{key}" for key in HIDDEN_KEYS)}:
        delete(uri)
    assert list(list_objects(root)) == []


def rows_of(listing: Listing) -> list[dict[str, Any]]:
    """The listing's rows; it must be a small one."""
    return [row for part in range(listing.rows.num_parts) for row in listing.rows.part(part).to_pylist()]


def _check_pixels(listing: Listing, uris: list[str]) -> None:
    """Each uri gives its own image."""
    block = read_block(listing.rows.part(0), job=make_job())
    assert block["error"].null_count == block["width"].length() - block["width"].null_count == len(uris)
    numbers = {uri: number for number, uri in enumerate(uris)}
    for row in block.select(["uri", "pixels"]).to_pylist():
        expected = decode(key_image(numbers[row["uri"]]), image_size=SIDE, resize_mode="squash").pixels
        np.testing.assert_array_equal(np.array(row["pixels"], np.uint8).reshape(expected.shape), expected)


def _write_table(listing: Listing, table_uri: str) -> Any:
    schema = images_schema(DIM)
    rows = listing.rows.part(0)
    for field in list(schema)[rows.num_columns :]:
        rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    made = table.create_table(table_uri, schema)
    return table.append(made, table.write_fragments(rows.cast(schema), table_uri))


def _gap(listing: Listing, images: Any, folder: Path) -> Gap:
    return write_gap(listing.rows, table.scan_state(images), folder=folder, gap_uri=str(folder / "files"))


def _counts(gap: Gap) -> tuple[int, int, int, int]:
    return gap.num_new, gap.num_changed, gap.num_gone, gap.num_unchanged
