"""List: what there is to index, as rows (uri, etag, size and the user's metadata) on this disk.

Four kinds of source, told apart by what is found:

    folder or s3://bucket/prefix    image files by suffix, at any depth
    tars in it (WebDataset)         the images in each uncompressed .tar, from its headers
    one .parquet file               a manifest: uri, etag, optional size_bytes, other columns are metadata
    a folder of .parquet files      the same in parts, if there are no images beside them

Names that begin with a dot, and all below them, are ignored, on disk and in a bucket alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa

from for_ray.errors import DataError
from for_ray.schema import LISTING_SCHEMA
from for_ray.storage import (
    Entry,
    Spill,
    canonical_uri,
    is_s3,
    list_members,
    list_objects,
    manifest_schema,
    read_manifest,
    shown,
    stat,
)

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".png"}
    | {".ppm", ".tif", ".tiff", ".webp"}
)
"""Suffixes that make an object an image, in lower case."""

NUM_TAR_READERS = 8

MAX_MANIFESTS = 100_000


@dataclass(frozen=True)
class Listing:
    """What was listed.

    Args:
        rows: `LISTING_SCHEMA` and the metadata columns, on this disk.
        num_ignored: Objects that are neither images, nor tars, nor manifests; hidden ones too.
        ignored: The uri of one of them; None where there are none.
        metadata: The manifest's other columns that have a value; empty without a manifest.
    """

    rows: Spill
    num_ignored: int
    ignored: str | None
    metadata: pa.Schema

    @property
    def num_listed(self) -> int:
        """Images; the same uri twice counts twice until the diff refuses it."""
        return self.rows.num_rows


def is_hidden(name: str) -> bool:
    """Whether an object is ignored for a dot in front of its name, or of a folder's; below the root."""
    return name.startswith(".") or "/." in name


def write_listing(
    images_uri: str,
    folder: Path,
    *,
    known: pa.Schema | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Listing:
    """List all images, streaming: memory does not grow with their number.

    Args:
        images_uri: A folder, a prefix, a manifest, a folder of manifests, or one tar.
        folder: Where rows are kept on this disk: about 50 bytes an image. The caller removes it.
        known: Columns of the table there is: metadata is of their types.
        progress: Called with the number listed so far, about once a page.

    Raises:
        DataError: There are no images, or a manifest is wrong.
        StorageError: The folder or bucket is missing, or the store refused.
    """
    source = _Source(canonical_uri(images_uri))
    manifests = source.single_manifest()
    metadata = pa.schema([])
    rows = Spill(folder, LISTING_SCHEMA)
    if not manifests:
        _add(rows, source.images(), progress)
        manifests = source.all_manifests() if rows.num_rows == 0 else []
    if manifests:
        schema = manifest_schema(manifests, known)
        rows = Spill(folder, schema)
        batches = (batch for uri in manifests for batch in read_manifest(uri, schema))
        names = _add(rows, batches, progress)
        metadata = pa.schema([field for field in list(schema)[len(LISTING_SCHEMA) :] if field.name in names])
    rows.finish()
    if rows.num_rows == 0:
        raise source.nothing_found()
    if not manifests:
        source.ignore_manifests()
    return Listing(rows, source.num_ignored, source.ignored, metadata)


def _add(rows: Spill, batches: Iterable[pa.RecordBatch], progress: Callable[[int], None]) -> set[str]:
    """Add the batches; the names of the columns that have a value."""
    names: set[str] = set()
    for batch in batches:
        rows.add(batch)
        names.update(
            name
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
            if column.null_count < len(column)
        )
        progress(rows.num_rows)
    return names


class _Source:
    """One walk over a folder, prefix or tar, and what it met besides images."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.num_ignored = 0
        self.ignored: str | None = None
        self.num_manifests = 0
        self._manifests: list[str] = []
        self._suffixes: set[str] = set()

    def single_manifest(self) -> list[str]:
        """The uri itself, if it is one Parquet file rather than a folder of that name."""
        if not self.uri.endswith(".parquet") or not self._is_object():
            return []
        self.num_manifests = 1
        return [self.uri]

    def all_manifests(self) -> list[str]:
        """The Parquet files that `images` met."""
        if self.num_manifests > MAX_MANIFESTS:
            raise DataError(
                f"{shown(self.uri)} holds {self.num_manifests} manifests, more than {MAX_MANIFESTS}; "
                "write fewer, larger ones"
            )
        return sorted(self._manifests)

    def images(self) -> Iterator[pa.RecordBatch]:
        """The images as rows of `LISTING_SCHEMA`; fills the other fields on the way."""
        if self.uri.endswith(".tar") and self._is_object():
            yield from self._members([stat(self.uri)])
            return
        tars: list[Entry] = []
        for page in list_objects(self.uri):
            images = [entry for entry in page if self._is_image(entry, tars)]
            yield from self._rows(images)
            if len(tars) >= NUM_TAR_READERS:
                yield from self._members(tars)
                tars = []
        yield from self._members(tars)

    def ignore_manifests(self) -> None:
        """Count the Parquet files that `images` met with what was ignored: there are images beside them."""
        self.num_ignored += self.num_manifests
        self.ignored = self.ignored or next(iter(self._manifests), None)

    def nothing_found(self) -> DataError:
        """The error that says what there was instead of images."""
        expected = "expected files like .jpg, .png or .webp, .tar files of them, or a .parquet manifest"
        if self.num_manifests:
            return DataError(f"the manifest {shown(self.uri)} has no rows; expected at least one image")
        if is_s3(self.uri) and not self.num_ignored and self._is_object():
            return DataError(f"{shown(self.uri)} is one object, not a prefix; {expected}")
        kinds = ", ".join(sorted(self._suffixes)[:8])
        found = f"{self.num_ignored} of other kinds ({kinds})" if self.num_ignored else "nothing"
        return DataError(f"there are no images in {shown(self.uri)}: found {found}; {expected}")

    def _is_object(self) -> bool:
        try:
            stat(self.uri)
        except DataError:
            return False
        return True

    def _is_image(self, entry: Entry, tars: list[Entry]) -> bool:
        name = entry.uri[len(self.uri) + 1 :]
        if name.endswith("/"):  # what S3 consoles make for an empty folder
            return False
        suffix = PurePosixPath(name).suffix.lower()
        if is_hidden(name):
            self._ignore(entry.uri, suffix)
        elif suffix in IMAGE_SUFFIXES:
            return True
        elif suffix == ".tar":
            tars.append(entry)
        elif suffix == ".parquet":
            self.num_manifests += 1
            if self.num_manifests <= MAX_MANIFESTS:
                self._manifests.append(entry.uri)
        else:
            self._ignore(entry.uri, suffix)
        return False

    def _ignore(self, uri: str, suffix: str) -> None:
        self.num_ignored += 1
        self.ignored = self.ignored or uri
        if len(self._suffixes) < 100:
            self._suffixes.add(suffix or "no suffix")

    def _members(self, tars: list[Entry]) -> Iterator[pa.RecordBatch]:
        if not tars:
            return
        with ThreadPoolExecutor(NUM_TAR_READERS) as pool:
            for tar, members in zip(tars, pool.map(_last_members, tars), strict=True):
                is_member = [self._is_member(tar, member) for member in members]
                yield from self._rows(
                    [m for m, is_wanted in zip(members, is_member, strict=True) if is_wanted]
                )

    def _is_member(self, tar: Entry, member: Entry) -> bool:
        if member.uri == tar.uri:  # stands for the damage, see storage.tars
            return True
        name = member.uri[len(tar.uri) + 1 :]
        suffix = PurePosixPath(name).suffix.lower()
        if PurePosixPath(name).name.startswith(".") or suffix not in IMAGE_SUFFIXES:
            self._ignore(member.uri, suffix)
            return False
        return True

    def _rows(self, entries: list[Entry]) -> Iterator[pa.RecordBatch]:
        """One batch, without the names that are no UTF-8, which no column of text can hold."""
        named = []
        for entry in entries:
            if _is_text(entry.uri):
                named.append(entry)
            else:
                self._ignore(entry.uri, "a name that is not UTF-8")
        if named:
            yield pa.record_batch(
                [list(column) for column in zip(*named, strict=True)], schema=LISTING_SCHEMA
            )


def _last_members(tar: Entry) -> list[Entry]:
    """The members of a tar; of those with one name the last, as unpacking it would leave them."""
    return list({member.uri: member for member in list_members(tar)}.values())


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # surrogates stand for the bytes that could not be decoded
        return False
    return True
