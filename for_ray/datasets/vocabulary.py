"""Lists of category names: ImageNet-21K's, and anyone's own from a text file; and what means the same."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from for_ray.datasets.labelled import Ragged
from for_ray.errors import ConfigError, DataError, StorageError
from for_ray.storage import read_bytes

IMAGENET21K = "imagenet21k"

_QUALIFIER = re.compile(r"\s*\([^()]*\)$")


@dataclass(frozen=True)
class Vocabulary:
    """The names that images are labelled with.

    Attributes:
        source: `imagenet21k`, or the file's uri.
        names: Without repetitions, in the source's order; a label is an index into them.
        dropped: The names that were left out.
    """

    source: str
    names: tuple[str, ...]
    dropped: tuple[str, ...] = ()


def read_vocabulary(source: str, *, excluded: Sequence[str] = ()) -> Vocabulary:
    """The vocabulary that a setting names.

    Args:
        source: `imagenet21k` (the first lemma of each class), or the uri of a file with one name a line.
        excluded: Categories; names that mean one of them, as `meanings` has it, are left out.

    Raises:
        ConfigError: The file cannot be read or names nothing, or nothing is left.
    """
    names = imagenet21k_names() if source == IMAGENET21K else read_names(source)
    names = list(dict.fromkeys(names))
    if not excluded:
        return Vocabulary(source, tuple(names))
    num_meant = np.diff(meanings(names, excluded).offsets)
    kept, dropped = (
        tuple(name for name, num in zip(names, num_meant, strict=True) if bool(num) is is_dropped)
        for is_dropped in (False, True)
    )
    if not kept:
        raise ConfigError(f"all names of the vocabulary {source} mean novel categories; give another one")
    return Vocabulary(source, kept, dropped)


def meanings(names: Sequence[str], categories: Sequence[str], *, only_missing: bool = False) -> Ragged:
    """Which of the categories each name means: those of the same name, or with a common ImageNet-21K class.

    Case, underscores and what stands in parentheses at the end do not count. Homonyms are not told apart, and
    narrower names ("tabby") do not mean the wider category ("cat").

    Args:
        names: V names.
        categories: What they may mean.
        only_missing: Let synonyms stand only for categories that none of the names equals.

    Returns:
        For each name the indices of categories; mostly none, sometimes several.
    """
    plain = [_plain(name) for name in names]
    equal: defaultdict[str, set[int]] = defaultdict(set)
    for index, category in enumerate(categories):
        equal[_plain(category)].add(index)
    known = set(plain)
    looked_for = {name: found for name, found in equal.items() if not (only_missing and name in known)}
    similar: defaultdict[str, set[int]] = defaultdict(set)
    for lemmas in _plain_lemmas() if looked_for else ():
        shared = {index for lemma in lemmas for index in looked_for.get(lemma, ())}
        for lemma in lemmas if shared else ():
            similar[lemma] |= shared
    return Ragged.of([sorted(equal.get(name, set()) | similar.get(name, set())) for name in plain])


@functools.cache
def imagenet21k_lemmas() -> tuple[tuple[str, ...], ...]:
    """All names of every ImageNet-21K class, from timm's list.

    Returns:
        21,843 tuples in timm's order of classes; each holds the class's lemmas as written there
        (`("person", "individual", ...)`), at least one. A lemma may belong to several classes.
    """
    from timm.data import ImageNetInfo  # imports torch: seconds that `--help` need not wait for

    classes = ImageNetInfo("imagenet21k")
    return tuple(
        tuple(lemma.strip() for lemma in classes.index_to_description(index).split(","))
        for index in range(classes.num_classes())
    )


def imagenet21k_names() -> list[str]:
    """The first lemma of every ImageNet-21K class, 21,843 strings; a few classes share theirs."""
    return [lemmas[0] for lemmas in imagenet21k_lemmas()]


def read_names(uri: str | Path) -> list[str]:
    """Read a vocabulary from a UTF-8 text file with one name a line.

    Returns:
        The names in the file's order, stripped; empty lines and repetitions are left out.

    Raises:
        ConfigError: The file cannot be read, is not UTF-8, or names nothing.
    """
    try:
        text = read_bytes(str(uri)).decode("utf-8-sig")
    except (DataError, StorageError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the names in {uri}: {error}; give a UTF-8 file, one name a line"
        ) from error
    names = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not names:
        raise ConfigError(f"{uri} names nothing; give a UTF-8 file with one name a line")
    return names


@functools.cache
def _plain_lemmas() -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(_plain(lemma) for lemma in lemmas) for lemmas in imagenet21k_lemmas())


def _plain(name: str) -> str:
    return " ".join(_QUALIFIER.sub("", name.replace("_", " ")).casefold().split())
