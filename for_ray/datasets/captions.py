"""Captions: alone, as a set that pseudo-captions are drawn from, and beside the images that they describe.

Alone, by the end of the file's name:

    FILE.txt        one a line
    FILE.tsv        as CC12M comes: no header, no quotes; what stands after the line's last tab. Addresses
                    there, as in CC3M, whose order is the other one, are refused
    FILE.parquet    a column `caption`
    FILE.jsonl      as the picture book writes it: lines with `captions`, a list

Such a set may be large: `CaptionStream` reads it block by block.

With images, by one word: `pairs:FILE.csv|.tsv|.parquet` with columns `uri` and `caption`, an image as often
as it has captions; or `picturebook:DIR`. Empty captions are left out, repeated ones count once, and of one
that is longer than `MAX_CHARACTERS` the rest is cut off; pairs without a uri are left out. Each is counted
and told.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from for_ray.datasets.labelled import Ragged
from for_ray.datasets.tables import beside, read_columns, stream_column, stream_lines
from for_ray.errors import ConfigError, DataError
from for_ray.storage import canonical_uri, exists, join_uri, shown

MAX_CHARACTERS = 2000
"""Far more than any tokenizer keeps: CLIP's cuts at 77 tokens."""

ADDRESS = re.compile(r"https?://\S+")
"""What stands beside captions, and is none."""

LINES_LOOKED_AT = 1000
"""At a file's beginning, for addresses where captions should be."""

PAIR_FORMS = "pairs:FILE.csv|.tsv|.parquet, picturebook:DIR"


@dataclass
class CaptionCounts:
    """What became of the captions that were given.

    Attributes:
        num_given: Lines or rows of the file.
        num_distinct: That are taken.
        num_empty: That were empty, and left out.
        num_repeated: That were there before, and left out.
        num_cut: That were too long.
    """

    num_given: int = 0
    num_distinct: int = 0
    num_empty: int = 0
    num_repeated: int = 0
    num_cut: int = 0

    def describe(self) -> str:
        """One line."""
        return (
            f"{self.num_distinct:,} captions ({self.num_empty:,} empty and {self.num_repeated:,} repeated "
            f"ones left out, {self.num_cut:,} cut to {MAX_CHARACTERS:,} characters)"
        )

    def clean(self, given: Iterable[str | None]) -> list[str]:
        """The captions as they are taken, "" for an empty one; empty and long ones are counted."""
        texts = []
        for each in given:
            text = " ".join(str(each or "").split())
            self.num_cut += len(text) > MAX_CHARACTERS
            texts.append(text[:MAX_CHARACTERS])
        self.num_given += len(texts)
        self.num_empty += texts.count("")
        return texts


@dataclass(frozen=True)
class Captions:
    """Captions in memory.

    Attributes:
        texts: Distinct, not empty, one line each; in the order of their first places.
        counts: What they are of.
    """

    texts: tuple[str, ...]
    counts: CaptionCounts

    def describe(self) -> str:
        """One line."""
        return self.counts.describe()


@dataclass(frozen=True)
class CaptionedImages:
    """Images with captions.

    Attributes:
        name: What messages call the set.
        uris: Unique uris of the images [B], strings.
        captions: The distinct captions of all images.
        of_image: Which of them each image has; at least one.
        num_nowhere: Captions that came without a uri, and were left out.
    """

    name: str
    uris: pa.ChunkedArray
    captions: Captions
    of_image: Ragged
    num_nowhere: int = 0

    def __len__(self) -> int:
        """B."""
        return len(self.uris)

    def describe(self) -> str:
        """One line."""
        nowhere = f"; {self.num_nowhere:,} rows without a uri left out" if self.num_nowhere else ""
        return f"{self.name}: {len(self):,} images, {self.captions.describe()}{nowhere}"


class CaptionStream:
    """A set of captions that need not fit into memory; iterated once, from the file's beginning to its end.

    Gives lists of captions: distinct, not empty, one line each; in the order of their first places. Memory:
    a block of the file and 8 bytes a caption, twice while they are sorted: 160 MB at 10⁷ captions.

    Args:
        uri: The file, as this module says.

    Raises:
        DataError: It is no such file; while it is read: it is not UTF-8, or holds no caption.
        StorageError: The store refused.
    """

    def __init__(self, uri: str) -> None:
        self._uri = canonical_uri(uri)
        self.counts = CaptionCounts()
        self._given = _given_captions(self._uri)

    def __iter__(self) -> Iterator[list[str]]:
        """List by list; `counts` grow with them."""
        seen, counts = _Seen(), self.counts
        for given in self._given:
            texts = [text for text in counts.clean(given) if text]
            is_new = seen.add(texts)
            counts.num_distinct += int(is_new.sum())
            counts.num_repeated += int((~is_new).sum())
            yield [text for text, new in zip(texts, is_new.tolist(), strict=True) if new]
        if not counts.num_distinct:
            raise DataError(f"{shown(self._uri)} holds no caption: {counts.num_given:,} rows, all empty")


class _Seen:
    """Which texts were there before, by 64 bits of their hashes.

    Two of 10⁷ different texts share these with a probability of 3·10⁻⁶; the later counts as repeated then.
    """

    def __init__(self) -> None:
        self._known: list[
            NDArray[np.uint64]
        ] = []  # each sorted, and less than half as long as the one before

    def add(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Whether each is new: neither known nor among those before it."""
        hashed = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
        hashes = np.frombuffer(hashed, np.uint64)
        is_new = np.zeros(len(hashes), bool)
        is_new[np.unique(hashes, return_index=True)[1]] = True
        for known in self._known:
            place = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            is_new &= known[place] != hashes
        added = np.sort(hashes[is_new])
        while len(added) and self._known and len(self._known[-1]) <= 2 * len(added):
            added = np.sort(np.concatenate([self._known.pop(), added]))
        self._known += [added] if len(added) else []
        return is_new


def _given_captions(uri: str) -> Iterator[list[str | None]]:
    """What the file gives, some thousands at a time; the name's end is checked at once."""
    if uri.endswith(".parquet"):
        return stream_column(uri, "caption")
    if uri.endswith(".jsonl"):
        return ([text for _, texts in lines for text in texts] for lines in _lines_of_book(uri))
    if uri.endswith(".tsv"):
        return _last_fields(uri)
    if uri.endswith(".txt"):
        return (list(lines) for lines in stream_lines(uri))
    raise DataError(f"captions {shown(uri)} must end with .txt, .tsv, .parquet or .jsonl")


def _last_fields(uri: str) -> Iterator[list[str | None]]:
    is_looked_at = False
    for lines in stream_lines(uri):
        fields = [line.rpartition("\t")[2] for line in lines]
        if not is_looked_at:
            _refuse_addresses(uri, fields[:LINES_LOOKED_AT])
            is_looked_at = True
        yield [*fields]


def _refuse_addresses(uri: str, fields: list[str]) -> None:
    addresses = [field for field in fields if ADDRESS.fullmatch(field.strip())]
    if 2 * len(addresses) > len(fields):
        raise DataError(
            f"{shown(uri)}: after the last tab most lines have an address, such as {addresses[0][:60]!r}, "
            "expected captions: where these come first, as in CC3M, take their column alone, such as by "
            "cut -f1 FILE.tsv > FILE.txt"
        )


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
    num_nowhere = 0
    if kind == "pairs":
        table = canonical_uri(place)
        uris, texts = read_columns(table, ("uri", "caption"), texts=["caption"])
        pairs = [
            (canonical_uri(beside(table, uri)), text) for uri, text in zip(uris, texts, strict=True) if uri
        ]
        num_nowhere = len(uris) - len(pairs)
    else:
        book = _lines_of_book(join_uri(place, "captions.jsonl"))
        pairs = [
            (join_uri(place, "images", name), text)
            for lines in book
            for name, texts in lines
            for text in texts
        ]
    return _captioned(f"{kind} {PurePosixPath(place.rstrip('/')).stem}", pairs, num_nowhere)


def _captioned(name: str, pairs: Sequence[tuple[str, str]], num_nowhere: int) -> CaptionedImages:
    counts, place = CaptionCounts(), dict[str, int]()
    texts = counts.clean(text for _, text in pairs)
    kept = [
        (uri, place.setdefault(text, len(place))) for (uri, _), text in zip(pairs, texts, strict=True) if text
    ]
    if not kept:
        nowhere = f"; {num_nowhere:,} rows have no uri" if num_nowhere else ""
        raise DataError(f"{name} has no image with a caption{nowhere}")
    counts.num_distinct, counts.num_repeated = len(place), len(kept) - len(place)
    uris = {uri: index for index, uri in enumerate(dict.fromkeys(uri for uri, _ in kept))}
    of_image = Ragged.of_pairs(
        np.array([uris[uri] for uri, _ in kept]), np.array([row for _, row in kept]), len(uris)
    )
    images = pa.chunked_array([pa.array(list(uris), pa.string())])
    return CaptionedImages(name, images, Captions(tuple(place), counts), of_image, num_nowhere)


def _lines_of_book(uri: str) -> Iterator[list[tuple[str, list[str]]]]:
    if not exists(uri):
        raise DataError(f"there are no captions at {shown(uri)}; the picture book writes captions.jsonl")
    num_before = 0
    for lines in stream_lines(uri):
        yield [_line_of_book(uri, number, line) for number, line in enumerate(lines, start=num_before + 1)]
        num_before += len(lines)


def _line_of_book(uri: str, number: int, line: str) -> tuple[str, list[str]]:
    try:
        record = json.loads(line)
        # JSON may hold halves of characters, which no file can.
        texts = [str(text).encode("utf-8", "replace").decode() for text in record["captions"]]
        return str(record["file_name"]), texts
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{shown(uri)} line {number:,} is not {{"file_name": …, "captions": […]}}') from error
