"""Captions: alone, as a set that pseudo-captions are drawn from, and beside the images that they describe.

Alone, by the end of the file's name:

    FILE.txt        one a line
    FILE.tsv        as CC12M comes: no header, no quotes; what stands after the line's last tab
    FILE.parquet    a column `caption`
    FILE.jsonl      as the picture book writes it: lines with `captions`, a list

With images, by one word: `pairs:FILE.csv|.tsv|.parquet` with columns `uri` and `caption`, an image as often
as it has captions; or `picturebook:DIR`. Empty captions are left out, repeated ones count once, and of one
that is longer than `MAX_CHARACTERS` the rest is cut off; each is counted and told.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from for_ray.datasets.labelled import Ragged
from for_ray.datasets.tables import beside, parquet_table, read_columns, read_lines
from for_ray.errors import ConfigError, DataError
from for_ray.storage import canonical_uri, exists, join_uri, shown

MAX_CHARACTERS = 2000
"""Far more than any tokenizer keeps: CLIP's cuts at 77 tokens."""

PAIR_FORMS = "pairs:FILE.csv|.tsv|.parquet, picturebook:DIR"


@dataclass(frozen=True)
class Captions:
    """A set of captions.

    Attributes:
        texts: Distinct, not empty, one line each; in the order of their first places.
        num_given: Lines or rows of the file.
        num_empty: That were empty, and left out.
        num_repeated: That were there before, and left out.
        num_cut: That were too long.
    """

    texts: tuple[str, ...]
    num_given: int
    num_empty: int
    num_repeated: int
    num_cut: int

    def describe(self) -> str:
        """One line."""
        return (
            f"{len(self.texts):,} captions ({self.num_empty:,} empty and {self.num_repeated:,} repeated ones "
            f"left out, {self.num_cut:,} cut to {MAX_CHARACTERS:,} characters)"
        )


@dataclass(frozen=True)
class CaptionedImages:
    """Images with captions.

    Attributes:
        name: What messages call the set.
        uris: Unique uris of the images [B], strings.
        captions: The distinct captions of all images.
        of_image: Which of them each image has; at least one.
    """

    name: str
    uris: pa.ChunkedArray
    captions: Captions
    of_image: Ragged

    def __len__(self) -> int:
        """B."""
        return len(self.uris)

    def describe(self) -> str:
        """One line."""
        return f"{self.name}: {len(self):,} images, {self.captions.describe()}"


def read_captions(uri: str) -> Captions:
    """Read a set of captions.

    Raises:
        DataError: It is no such file, not UTF-8, or holds no caption.
        StorageError: The store refused.
    """
    uri = canonical_uri(uri)
    if uri.endswith(".parquet"):
        given = parquet_table(uri, ["caption"])["caption"].to_pylist()
    elif uri.endswith(".jsonl"):
        given = [text for _, texts in _lines_of_book(uri) for text in texts]
    elif uri.endswith((".txt", ".tsv")):
        lines = read_lines(uri)
        given = [line.rpartition("\t")[2] for line in lines] if uri.endswith(".tsv") else lines
    else:
        raise DataError(f"captions {shown(uri)} must end with .txt, .tsv, .parquet or .jsonl")
    captions, _ = clean(given)
    if not captions.texts:
        raise DataError(f"{shown(uri)} holds no caption: {captions.num_given:,} rows, all empty")
    return captions


def clean(given: Iterable[str | None]) -> tuple[Captions, list[int]]:
    """The distinct captions, and for each given one which of them it is, -1 if it is empty."""
    place: dict[str, int] = {}
    rows, num_cut = [], 0
    for each in given:
        text = " ".join(str(each or "").split())
        num_cut += len(text) > MAX_CHARACTERS
        rows.append(place.setdefault(text[:MAX_CHARACTERS], len(place)) if text else -1)
    num_empty = rows.count(-1)
    return Captions(tuple(place), len(rows), num_empty, len(rows) - num_empty - len(place), num_cut), rows


def open_captioned(spec: str) -> CaptionedImages:
    """Images and their captions; no image is touched.

    Args:
        spec: As this module says.

    Raises:
        ConfigError: The spec is wrong.
        DataError: The file cannot be read, or no image has a caption.
        StorageError: The store refused.
    """
    kind, _, place = spec.partition(":")
    if not place or kind not in ("pairs", "picturebook"):
        raise ConfigError(f"no captioned images: {spec!r}; expected {PAIR_FORMS}")
    if kind == "pairs":
        table = canonical_uri(place)
        uris, texts = read_columns(table, ("uri", "caption"))
        pairs = [
            (canonical_uri(beside(table, uri)), text) for uri, text in zip(uris, texts, strict=True) if uri
        ]
    else:
        lines = _lines_of_book(join_uri(place, "captions.jsonl"))
        pairs = [(join_uri(place, "images", name), text) for name, texts in lines for text in texts]
    return _captioned(f"{kind} {PurePosixPath(place.rstrip('/')).stem}", pairs)


def _captioned(name: str, pairs: Sequence[tuple[str, str]]) -> CaptionedImages:
    captions, rows = clean(text for _, text in pairs)
    kept = [(uri, row) for (uri, _), row in zip(pairs, rows, strict=True) if row >= 0]
    if not kept:
        raise DataError(f"{name} has no image with a caption")
    uris = {uri: index for index, uri in enumerate(dict.fromkeys(uri for uri, _ in kept))}
    of_image = Ragged.of_pairs(
        np.array([uris[uri] for uri, _ in kept]), np.array([row for _, row in kept]), len(uris)
    )
    return CaptionedImages(name, pa.chunked_array([pa.array(list(uris), pa.string())]), captions, of_image)


def _lines_of_book(uri: str) -> list[tuple[str, list[str]]]:
    if not exists(uri):
        raise DataError(f"there are no captions at {shown(uri)}; the picture book writes captions.jsonl")
    found = []
    for number, line in enumerate(read_lines(uri), start=1):
        try:
            record = json.loads(line)
            found.append((str(record["file_name"]), [str(text) for text in record["captions"]]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{shown(uri)} line {number:,} is not {{"file_name": …, "captions": […]}}'
            ) from error
    return found
