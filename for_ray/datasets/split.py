"""Which categories are base and which are novel: `{"base": […], "novel": […]}`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from for_ray import storage
from for_ray.errors import ConfigError, DataError
from for_ray.storage import shown

MAX_SPLIT_BYTES = 64 << 20


@dataclass(frozen=True)
class Split:
    """Names of categories; those of a data set that it does not name are unused.

    Attributes:
        base: Known in training.
        novel: Only asked for.
        source: What messages call it.
    """

    base: tuple[str, ...]
    novel: tuple[str, ...]
    source: str

    def spaced(self) -> Split:
        """The same with spaces for underscores, as LVIS and nuImages are asked for."""
        base, novel = (tuple(map(spaced, names)) for names in (self.base, self.novel))
        return Split(base, novel, self.source)


def spaced(name: str) -> str:
    """A name as it is asked for: `trash_can` → `trash can`."""
    return " ".join(name.replace("_", " ").split())


def read_split(uri: str) -> Split:
    """Read a split from a JSON file on disk or in a bucket.

    Raises:
        ConfigError: It is not there, is no split, or names a category twice or in both groups.
        StorageError: The store refused.
    """
    try:
        content = json.loads(storage.read_bytes(uri, max_bytes=MAX_SPLIT_BYTES))
    except DataError as error:
        raise ConfigError(f"the split cannot be read: {error}") from error
    except ValueError as error:
        raise ConfigError(f"the split {shown(uri)} is not JSON: {error}") from error
    if not isinstance(content, dict) or set(content) != {"base", "novel"}:
        raise ConfigError(f'the split {shown(uri)} must be {{"base": [names], "novel": [names]}}')
    split = Split(_names(content["base"], uri), _names(content["novel"], uri), shown(uri))
    _require_distinct(split)
    return split


def _names(given: Any, uri: str) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(name, str) and name.strip() for name in given):
        raise ConfigError(f"the split {shown(uri)} must hold lists of names, got {str(given)[:60]!r}")
    return tuple(name.strip() for name in given)


def _require_distinct(split: Split) -> None:
    if shared := sorted(set(split.base) & set(split.novel)):
        raise ConfigError(f"the split {split.source} has {listed(shared)} as base and as novel; choose one")
    if twice := repeated((*split.base, *split.novel)):
        raise ConfigError(f"the split {split.source} names {listed(twice)} more than once")


def arrange(
    names: Sequence[str], split: Split, source: str
) -> tuple[tuple[str, ...], NDArray[np.bool_], NDArray[np.int64]]:
    """The categories of a data set as its split wants them.

    Args:
        names: Of the data set.
        split: Which of them are base, which novel.
        source: What messages call the data set.

    Returns:
        The names that are used, base ones first, in the data set's order; whether each is novel; and for each
        of `names` its place among them, -1 where it is unused.

    Raises:
        ConfigError: The split names what the data set has not, or nothing at all.
        DataError: The data set has a name twice.
    """
    if twice := repeated(names):
        raise DataError(f"{source} has several categories of one name: {listed(twice)}")
    if unknown := sorted({*split.base, *split.novel} - set(names)):
        raise ConfigError(
            f"the split {split.source} names {listed(unknown)}, which {source} has not; its categories are "
            f"{listed(names)}"
        )
    base, novel = ([name for name in names if name in group] for group in (set(split.base), set(split.novel)))
    used = (*base, *novel)
    if not used:
        raise ConfigError(f"the split {split.source} names no category")
    place = {name: index for index, name in enumerate(used)}
    is_novel = np.arange(len(used)) >= len(base)
    return used, is_novel, np.array([place.get(name, -1) for name in names], np.int64)


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names for a message: the first few, and how many more."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
