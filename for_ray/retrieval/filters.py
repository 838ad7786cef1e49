"""Filters → ids of the images that may be found, read from the snapshot's version of the table."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from for_ray import storage
from for_ray.errors import ConfigError
from for_ray.retrieval.question import Filters
from for_ray.storage.refusals import lance_refusals

MAX_FILTER_LETTERS = 10_000
"""Of one filter."""

_OWN_COLUMNS = frozenset({"vectors", "boxes", "error"})  # of no use in a filter


def filtered_ids(images: Any, filters: Filters) -> NDArray[np.int64] | None:
    """The images that pass, ascending; None where nothing is filtered.

    Args:
        images: The table, at the snapshot's version.
        filters: What must hold.

    Raises:
        ConfigError: A filter is too long, no pattern, or not one that Lance understands.
        StorageError: The store refused.
    """
    if not filters:
        return None
    ids = None if filters.image_ids is None else np.unique(np.asarray(filters.image_ids, np.int64))
    ids = None if ids is None else ids[ids >= 0]  # a row id has no sign
    if filters.under is None and filters.glob is None and filters.where is None:
        return ids
    for value in (filters.under, filters.glob, filters.where):
        if value is not None and not 1 <= len(value.strip()) <= len(value) <= MAX_FILTER_LETTERS:
            found = f"a filter has 1 to {MAX_FILTER_LETTERS:,} letters, got {len(value):,}"
            raise ConfigError(f"{found}: leave it out, or give a table of ids")
    if filters.where is not None:
        _check_where(images, filters.where)
    found_ids = _row_ids(images, " AND ".join(_conditions(filters)))
    return found_ids if ids is None else np.intersect1d(ids, found_ids, assume_unique=True)


def columns_of(images: Any) -> list[str]:
    """The columns that a filter may name."""
    return [field.name for field in images.schema if field.name not in _OWN_COLUMNS]


def prefix_of(uri: str) -> str:
    """A prefix as the index's uris begin: a path is made absolute; what comes after stays as it is."""
    if storage.is_s3(uri):
        return uri
    return storage.canonical_uri(uri) + ("/" if uri.endswith("/") and uri.strip("/") else "")


def pattern_of(glob: str) -> str:
    """A glob as a regular expression of Rust's `regex`, for a whole uri.

    Raises:
        ConfigError: A bracket is never closed.
    """
    parts, place = [], 0
    while place < len(glob):
        letter = glob[place]
        if letter == "[":
            end = glob.find("]", place + 2)
            if end < 0:
                raise ConfigError(f"the pattern {glob!r}: the bracket at letter {place + 1} is never closed")
            inside = glob[place + 1 : end]
            negated, inside = inside[:1] == "!", inside.removeprefix("!")
            escaped = re.sub(r"([][\\^&~])", r"\\\1", inside)
            parts.append(f"[^{escaped}]" if negated else f"[{escaped}]")
            place = end
        else:
            parts.append({"*": ".*", "?": "."}.get(letter) or re.escape(letter))
        place += 1
    return f"^(?s:{''.join(parts)})$"


def _conditions(filters: Filters) -> list[str]:
    conditions = []
    if filters.under is not None:
        conditions.append(f"starts_with(uri, {_quoted(prefix_of(filters.under))})")
    if filters.glob is not None:
        conditions.append(f"regexp_like(uri, {_quoted(pattern_of(filters.glob))})")
    if filters.where is not None:
        # On lines of its own, since it may end with a comment.
        conditions.append(f"(\n{filters.where}\n)")
    return conditions


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _check_where(images: Any, where: str) -> None:
    """Whether the filter is one by itself, of columns that there are: read for no row."""
    try:
        images.scanner(columns=["uri"], filter=where, limit=0).to_table()
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split(", /")[0].split())
        reason = reason.split(" Valid fields are")[0].removeprefix("Invalid user input: ").rstrip(".")
        columns = ", ".join(columns_of(images))
        raise ConfigError(f"the filter {where!r} is not understood: {reason}; columns: {columns}") from error


def _row_ids(images: Any, condition: str) -> NDArray[np.int64]:
    with lance_refusals(images.uri):
        rows = images.to_table(columns=[], filter=condition, with_row_id=True)
    return np.sort(rows["_rowid"].to_numpy().astype(np.int64))
