"""Several segments of one codec → one, without the vectors of images that are gone.

Since they share their centroids, merging is a concatenation of inverted lists: no vector is decoded, assigned
or encoded again, so a merged segment gives each vector the score that it had, bit by bit. Inputs are mapped
into memory, and their lists copied one by one; memory: the codes of the merged segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from for_ray.errors import DataError
from for_ray.index.codec import open_index
from for_ray.index.probe import check_same_codec
from for_ray.index.segment import SegmentFile, write_segment
from for_ray.schema import image_ids_of


def merge_segments(paths: Sequence[Path], path: Path, *, dead_image_ids: NDArray[np.int64]) -> SegmentFile:
    """Write one segment with the vectors of all, list by list in the order of the inputs.

    Args:
        paths: At least one; a vector id is in one of them only.
        path: Where the merged segment goes, none of `paths`; replaced when it exists, whole or not at all.
        dead_image_ids: Images whose vectors are left out; any order, others than those in the segments too.

    Raises:
        DataError: A file is damaged, not of the first one's codec, or of a kind whose lists are not plain.
        StorageError: The disk refused to take the file.
    """
    inputs = [open_index(each, io_flags=faiss.IO_FLAG_MMAP_IFC) for each in paths]
    check_same_codec(inputs, paths)
    sources = [_plain_lists(index, each) for index, each in zip(inputs, paths, strict=True)]
    merged = open_index(paths[0], io_flags=faiss.IO_FLAG_MMAP_IFC)
    ivf = faiss.extract_index_ivf(merged)
    target = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
    num_vectors = _copy_lists(sources, target, np.unique(np.asarray(dead_image_ids, np.int64)))
    target.this.disown()  # the index frees its lists
    ivf.replace_invlists(target, True)
    ivf.ntotal = merged.ntotal = num_vectors
    return write_segment(merged, path)


def _plain_lists(index: faiss.Index, path: Path) -> faiss.InvertedLists:
    lists = faiss.extract_index_ivf(index).invlists
    # FastScan's blocks and Panorama's levels interleave the codes of several vectors.
    if (kind := type(faiss.downcast_InvertedLists(lists))) is not faiss.ArrayInvertedLists:
        raise DataError(
            f"{path} keeps its vectors in {kind.__name__}, which cannot be merged; choose a codec such as "
            "'HR,IVF,RaBitQ4', and the index is built anew from its table"
        )
    return lists


def _copy_lists(
    sources: Sequence[faiss.InvertedLists], target: faiss.InvertedLists, dead: NDArray[np.int64]
) -> int:
    """Append the live vectors of each list to the same list of the target; how many there are."""
    num_vectors = 0
    for number in range(target.nlist):
        parts = [_live(source, number, dead) for source in sources if source.list_size(number)]
        if not parts:
            continue
        # At once, so that the list takes the room that it needs and not up to twice as much.
        ids, codes = (np.concatenate(column) for column in zip(*parts, strict=True))
        if len(ids):
            target.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
        num_vectors += len(ids)
    return num_vectors


def _live(
    source: faiss.InvertedLists, number: int, dead: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Ids [n] and codes [n, bytes] of a list that has vectors, without the dead ones; n may be 0."""
    size = source.list_size(number)
    ids = faiss.rev_swig_ptr(source.get_ids(number), size)
    codes = faiss.rev_swig_ptr(source.get_codes(number), size * source.code_size).reshape(size, -1)
    if not len(dead):
        return ids, codes
    image_ids = image_ids_of(ids)
    is_live = dead[np.searchsorted(dead, image_ids).clip(max=len(dead) - 1)] != image_ids
    return ids[is_live], codes[is_live]
