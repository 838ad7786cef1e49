"""Which images a training sees, and in what order: the same on any number of workers, at any place."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from for_ray.datasets.labelled import LabelledImages, Ragged


def epoch_batches(num_rows: int, *, batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The rows of an epoch's global batches: a permutation, cut into as many parts as needed.

    The parts differ by one row at most, so that no batch is left with one image, and none is dropped.

    Args:
        num_rows: Images of the training.
        batch_size: Rows of a batch, at most, over all workers.
        seed: Of the run.
        epoch: From 0; another epoch has another order.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    return np.array_split(order, max(1, -(-num_rows // batch_size)))


def pick_share(names: Sequence[str], share: float, *, key: str) -> NDArray[np.bool_]:
    """Choose a share of the images by a hash of their names, bool [B].

    A larger share holds a smaller one of the same key; other keys choose independently.

    Args:
        names: Unique; what else there is beside a name does not change its hash.
        share: 0 to 1; above 0 at least one is chosen.
        key: Of the choice.
    """
    chosen = np.zeros(len(names), bool)
    count = min(len(names), max(1, round(share * len(names)))) if share > 0 else 0
    hashes = [hashlib.blake2b(f"{key}\n{name}".encode(), digest_size=8).digest() for name in names]
    chosen[np.argsort(np.array(hashes, "S8"), kind="stable")[:count]] = True
    return chosen


def relative_names(images: LabelledImages) -> list[str]:
    """The uris without the place of the data set: what a copy at another place has, too."""
    start = images.images_uri.rstrip("/") + "/"
    return [str(uri).removeprefix(start) for uri in images.uris.to_pylist()]


def pad(lists: Ragged) -> NDArray[np.int64]:
    """Lists as rows of a matrix [B, T], -1 behind the end of each; T is the longest's length, 1 at least."""
    lengths = np.diff(lists.offsets)
    padded = np.full((len(lists), max(1, lengths.max(initial=0))), -1, np.int64)
    rows = np.repeat(np.arange(len(lists)), lengths)
    padded[rows, np.arange(len(lists.values)) - lists.offsets[rows]] = lists.values
    return padded


def below(lists: Ragged, limit: int) -> Ragged:
    """The lists without the values from `limit` on: with the base categories first, their base labels."""
    kept = lists.values < limit
    counts = np.concatenate([[0], np.cumsum(kept)])
    return Ragged(counts[lists.offsets].astype(np.int64), lists.values[kept])
