"""Several segments of one codec → one, without the vectors of images that are gone.

Since they share their centroids, merging is a concatenation of inverted lists: no vector is decoded, assigned
or encoded again, so a merged segment gives each vector the score that it had, bit by bit. Inputs are mapped
into memory, and the output is written list by list, in the bytes that FAISS would write of it. Memory: the
codec, 8 bytes a list, `PIECE_BYTES`, and, where images are dead, some 30 bytes for each vector of one list;
not what the segments hold: a merged one may be as large as the disk allows, which holds the inputs, too.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from for_ray.errors import ConfigError, DataError
from for_ray.index.codec import open_index, write_index
from for_ray.index.probe import check_same_codec
from for_ray.index.segment import SegmentFile, write_whole
from for_ray.index.selection import is_among
from for_ray.schema import image_ids_of

PIECE_BYTES, BUFFER_BYTES = 16 << 20, 1 << 20
"""Codes that are copied at once where some of a list's vectors are left out, and what is written at once."""


def merge_segments(paths: Sequence[Path], path: Path, *, dead_image_ids: NDArray[np.int64]) -> SegmentFile:
    """Write one segment with the vectors of all, list by list in the order of the inputs.

    Args:
        paths: At least one; a vector id is in one of them only.
        path: Where the merged segment goes, none of `paths`; replaced when it exists, whole or not at all.
        dead_image_ids: Images whose vectors are left out; any order, others than those in the segments too.

    Raises:
        ConfigError: This FAISS writes its files in another way than the one that this module knows.
        DataError: A file is damaged, not of the first one's codec, or of a kind whose lists are not plain.
        StorageError: The disk refused to take the file.
    """
    inputs = [open_index(each, io_flags=faiss.IO_FLAG_MMAP_IFC) for each in paths]
    check_same_codec(inputs, paths)
    lists = [_plain_lists(index, each) for index, each in zip(inputs, paths, strict=True)]
    dead = np.unique(np.asarray(dead_image_ids, np.int64))
    sizes = sum((_live_sizes(each, dead) for each in lists), np.zeros(lists[0].nlist, np.int64))

    def write(part: Path) -> None:
        _write_codec(paths[0], part, num_vectors=int(sizes.sum()))
        _cut_lists(part, nlist=len(sizes), code_size=lists[0].code_size)
        with part.open("ab", buffering=BUFFER_BYTES) as file:
            file.write(_pack_sizes(sizes))
            for number in np.flatnonzero(sizes).tolist():
                for content in _contents([_read(each, number, dead) for each in lists]):
                    file.write(content.data)

    return write_whole(path, sizes, write)


def _plain_lists(index: faiss.Index, path: Path) -> faiss.InvertedLists:
    lists = faiss.extract_index_ivf(index).invlists
    # FastScan's blocks and Panorama's levels interleave the codes of several vectors.
    if (kind := type(faiss.downcast_InvertedLists(lists))) is not faiss.ArrayInvertedLists:
        raise DataError(
            f"{path} keeps its vectors in {kind.__name__}, which cannot be merged; choose a codec such as "
            "'HR,IVF,RaBitQ4', and the index is built anew from its table"
        )
    return lists


class _List(NamedTuple):
    """One list of one input: ids [n], codes [n, bytes], and which of them are live [n], None for all."""

    ids: NDArray[np.int64]
    codes: NDArray[np.uint8]
    is_live: NDArray[np.bool_] | None


def _read(lists: faiss.InvertedLists, number: int, dead: NDArray[np.int64]) -> _List:
    """A list as it lies in the file; nothing is copied."""
    if not (size := lists.list_size(number)):
        return _List(np.empty(0, np.int64), np.empty((0, lists.code_size), np.uint8), None)
    ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
    codes = faiss.rev_swig_ptr(lists.get_codes(number), size * lists.code_size).reshape(size, -1)
    return _List(ids, codes, _is_live(ids, dead) if len(dead) else None)


def _is_live(vector_ids: NDArray[np.int64], dead: NDArray[np.int64]) -> NDArray[np.bool_]:
    return ~is_among(image_ids_of(vector_ids), dead)


def _live_sizes(lists: faiss.InvertedLists, dead: NDArray[np.int64]) -> NDArray[np.int64]:
    sizes = np.fromiter(map(lists.list_size, range(lists.nlist)), np.int64, lists.nlist)
    for number in np.flatnonzero(sizes).tolist() if len(dead) else ():
        sizes[number] = np.count_nonzero(_is_live(_read(lists, number, dead[:0]).ids, dead))
    return sizes


def _contents(parts: Sequence[_List]) -> Iterator[NDArray[Any]]:
    """All codes of a list, then all ids, as FAISS keeps them; without the dead."""
    for part in parts:
        if part.is_live is None:
            yield part.codes
            continue
        step = max(1, PIECE_BYTES // part.codes.shape[1])
        for start in range(0, len(part.codes), step):
            piece = slice(start, start + step)
            yield part.codes[piece][part.is_live[piece]]
    for part in parts:
        yield part.ids if part.is_live is None else part.ids[part.is_live]


def _write_codec(segment_path: Path, path: Path, *, num_vectors: int) -> None:
    """Write a segment without its vectors, as one that has so many."""
    index = open_index(segment_path, io_flags=faiss.IO_FLAG_MMAP_IFC)
    ivf = faiss.extract_index_ivf(index)
    lists = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
    lists.this.disown()  # the index frees them
    ivf.replace_invlists(lists, True)
    ivf.ntotal = index.ntotal = num_vectors
    write_index(index, path)


# What FAISS's `write_InvertedLists` writes, the last part of a file: "ilar", nlist and the bytes of a code as
# uint64; "full", nlist and the size of each list, or, where no more than half of them have vectors, "sprs",
# twice the number of these, and number and size of each; then codes and ids of one list behind the other.


def _cut_lists(path: Path, *, nlist: int, code_size: int) -> None:
    """Take the sizes of the lists off a file that has no vectors; what they are of stays.

    Raises:
        ConfigError: They are not there.
    """
    head = struct.pack("<4sQQ", b"ilar", nlist, code_size)
    expected = head + _pack_sizes(np.zeros(nlist, np.int64))
    with path.open("r+b") as file:
        end = file.seek(-len(expected), os.SEEK_END)
        if file.read() != expected:
            raise ConfigError(
                f"faiss {faiss.__version__} writes inverted lists in another way than faiss 1.15, so that no "
                "segments can be merged; install the version that pyproject.toml names"
            )
        file.truncate(end + len(head))


def _pack_sizes(sizes: NDArray[np.int64]) -> bytes:
    held = np.flatnonzero(sizes)
    if len(held) > len(sizes) // 2:
        return struct.pack("<4sQ", b"full", len(sizes)) + sizes.astype("<u8").tobytes()
    pairs = np.stack([held, sizes[held]], axis=1).astype("<u8")
    return struct.pack("<4sQ", b"sprs", pairs.size) + pairs.tobytes()
