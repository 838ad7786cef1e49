"""Whether the files that a published snapshot names are there, and are what was written."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from for_ray.errors import DataError
from for_ray.index.codec import open_index, read_codec
from for_ray.index.faults import MEND_SEGMENTS
from for_ray.index.probe import check_same_codec
from for_ray.schema import Codec, Layout, Segment
from for_ray.storage import download, is_s3, join_uri, local_copy, local_path, shown, stat
from for_ray.storage.refusals import disk_refusals

NUM_ASKED = 16
"""Files that the store is asked for at once."""

_RESTORE = f"restore the file, or {MEND_SEGMENTS}"


def find_broken(table: Any) -> tuple[list[str], frozenset[int]]:
    """Files of a table's version that are not there, or not as long as they were written.

    Returns:
        A line for each such file, and the ids of the fragments that have one.

    Raises:
        StorageError: The store refused.
    """
    files = [
        (fragment, f"data/{file.path}", file.file_size_bytes)
        for fragment in table.get_fragments()
        for file in fragment.metadata.files
    ]
    files += [
        (fragment, path, None) for fragment in table.get_fragments() if (path := fragment.deletion_file())
    ]
    with ThreadPoolExecutor(NUM_ASKED) as pool:
        reasons = list(pool.map(lambda each: _why_broken(join_uri(table.uri, each[1]), each[2]), files))
    problems, broken = [], set()
    for (fragment, _, _), reason in zip(files, reasons, strict=True):
        if reason is not None:
            broken.add(fragment.fragment_id)
            num_rows = fragment.metadata.physical_rows - fragment.metadata.num_deletions
            problems.append(
                f"{reason}: {num_rows:,} images of version {table.version} of {shown(table.uri)} cannot be "
                "read; restore the file, or index the images anew in another place"
            )
    return problems, frozenset(broken)


def _why_broken(uri: str, num_bytes: int | None) -> str | None:
    try:
        found = stat(uri).size_bytes
    except DataError:
        return f"{shown(uri)} is not there"
    if num_bytes is not None and found != num_bytes:
        return f"{shown(uri)} has {found:,} bytes, expected {num_bytes:,}"
    return None


def fetch_checked(uri: str, sha256: str, folder: Path, *, num_bytes: int | None = None) -> Path:
    """A file on this disk, read afresh from the store: unlike `local_copy`, never out of the cache.

    Args:
        uri: The file or object.
        sha256: Its checksum, in hex.
        folder: Where an object is put.
        num_bytes: Its size, where it is known.

    Raises:
        DataError: It is not there, or another.
        StorageError: The store refused.
    """
    try:
        found = stat(uri).size_bytes
    except DataError as error:
        raise DataError(f"{shown(uri)} is not there") from error
    if num_bytes is not None and found != num_bytes:
        raise DataError(f"{shown(uri)} has {found:,} bytes, expected {num_bytes:,}")
    path = local_path(uri) if not is_s3(uri) else folder / Path(uri).name
    if is_s3(uri):
        download(uri, path)
    with disk_refusals("read", path), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise DataError(
            f"{shown(uri)} is damaged or was replaced: its SHA-256 is {digest[:16]}…, expected {sha256[:16]}…"
        )
    return path


def fetch_part(layout: Layout, fingerprint: str, part: Segment | Codec, folder: Path) -> Path:
    """A segment or codec on this disk; raises as `fetch_checked`, and says what to do."""
    uri = layout.segment_uri(fingerprint, part.file_name)
    try:
        return fetch_checked(uri, part.sha256, folder, num_bytes=part.num_bytes)
    except DataError as error:
        raise DataError(f"{error}; {_RESTORE}") from error


def check_codec(layout: Layout, fingerprint: str, codec: Codec, folder: Path) -> None:
    """Raise unless a codec's file is there and what the snapshot says of it.

    Raises:
        DataError: It is not.
        StorageError: The store refused.
    """
    path = fetch_part(layout, fingerprint, codec, folder)
    index = read_codec(path)
    nlist = faiss.extract_index_ivf(index).nlist
    if (index.d, nlist) != (codec.dim, codec.nlist):
        raise DataError(
            f"{shown(layout.segment_uri(fingerprint, codec.file_name))} has {index.d} dimensions and {nlist} "
            f"lists, the snapshot says {codec.dim} and {codec.nlist}; {MEND_SEGMENTS}"
        )


def read_vector_ids(path: Path, layout: Layout, fingerprint: str, codec: Codec | None) -> NDArray[np.int64]:
    """All vector ids of a segment, from its inverted lists, in no order; the rest stays on the disk.

    Args:
        path: The segment, its checksum checked.
        layout: The index.
        fingerprint: The encoder's.
        codec: That it must be of; None: any.

    Raises:
        DataError: It is no FAISS index, or one of another codec.
        StorageError: The store refused.
    """
    index = open_index(path, io_flags=faiss.IO_FLAG_MMAP_IFC)
    if codec is not None:
        _check_codec_of(index, path, layout.segment_uri(fingerprint, codec.file_name), codec)
    lists = faiss.extract_index_ivf(index).invlists
    sizes = [lists.list_size(number) for number in range(lists.nlist)]
    vector_ids = np.empty(sum(sizes), np.int64)
    start = 0
    for number, size in enumerate(sizes):
        if size:
            vector_ids[start : start + size] = faiss.rev_swig_ptr(lists.get_ids(number), size)
        start += size
    return vector_ids


def _check_codec_of(index: faiss.Index, path: Path, codec_uri: str, codec: Codec) -> None:
    try:
        codec_path = local_copy(codec_uri, sha256=codec.sha256)
    except DataError:  # `check_codec` tells
        return
    check_same_codec([open_index(codec_path), index], [codec_path, path])
