"""Filters → ids of the images that may be found, read from the snapshot's version of the table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from for_ray import storage
from for_ray.errors import ConfigError
from for_ray.index.selection import ALL_IDS
from for_ray.retrieval.question import Filters, shortened
from for_ray.retrieval.rows import REMEDY
from for_ray.storage.refusals import lance_refusals

MAX_FILTER_LETTERS = 10_000
"""Of one filter."""

MAX_REASON_LETTERS = 200
"""Of what Lance says of a filter: it may show whole trees."""

# What is passed over where parentheses are counted: text, names, comments.
_UNREAD = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`|--[^\n]*|/\*.*?\*/", re.DOTALL)
# Lance compares a column of whole numbers with those alone that its type can hold.
_NO_WHOLE_NUMBER = re.compile(r"Received literal (?:Float|U?Int)\d+\((\S+)\) .* of type '(U?Int\d+)'")
# Each reading of the table gives them another value. Text and columns with these names are taken for them.
_UNSTEADY = re.compile(r"\b(?:now|today|current_\w+|rand|random|uuid)\b", re.IGNORECASE)
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
    ids = None if filters.image_ids is None else _known_ids(filters.image_ids)
    if filters.under is None and filters.glob is None and filters.where is None:
        return ids
    for value in (filters.under, filters.glob, filters.where):
        if value is not None and not (value.strip() and len(value) <= MAX_FILTER_LETTERS):
            got = f"{len(value):,}" if value.strip() else "none but spaces"
            found = f"a filter has 1 to {MAX_FILTER_LETTERS:,} letters, got {got}"
            raise ConfigError(f"{found}: leave it out, or give ids")
    conditions = _conditions(filters)
    for named, condition in conditions.items() if len(conditions) > 1 else ():
        _check_condition(images, condition, named=named)
    found_ids = _row_ids(images, " AND ".join(conditions.values()), named=" and ".join(conditions))
    return found_ids if ids is None else np.intersect1d(ids, found_ids, assume_unique=True)


def _known_ids(image_ids: Sequence[int]) -> NDArray[np.int64]:
    """Ascending, each once, without those that no image can have."""
    return np.unique(np.array([each for each in image_ids if 0 <= each < ALL_IDS[1]], np.int64))


def is_steady(filters: Filters) -> bool:
    """Whether the same images of a snapshot pass each time: no condition asks for the time, or for chance."""
    return filters.where is None or _UNSTEADY.search(filters.where) is None


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
            end = glob.find("]", place + 2 + glob.startswith("!", place + 1))  # the first ] is one of them
            if end < 0:
                named = f"the pattern {shortened(glob)!r}"
                raise ConfigError(f"{named}: the bracket at letter {place + 1} is never closed; add ]")
            inside = glob[place + 1 : end]
            negated, inside = inside[:1] == "!", inside.removeprefix("!")
            escaped = re.sub(r"([][\\^&~])", r"\\\1", inside)
            parts.append(f"[^{escaped}]" if negated else f"[{escaped}]")
            place = end
        else:
            parts.append({"*": ".*", "?": "."}.get(letter) or re.escape(letter))
        place += 1
    return f"^(?s:{''.join(parts)})$"


def _conditions(filters: Filters) -> dict[str, str]:
    """What must hold as Lance's SQL, by what a refusal calls it."""
    conditions = {}
    if filters.under is not None:
        named = f"the prefix {shortened(filters.under)!r}"
        conditions[named] = f"starts_with(uri, {_quoted(prefix_of(filters.under))})"
    if filters.glob is not None:
        named = f"the pattern {shortened(filters.glob)!r}"
        conditions[named] = f"regexp_like(uri, {_quoted(pattern_of(filters.glob))})"
    if filters.where is not None:
        named = f"the filter {shortened(filters.where)!r}"
        _check_parentheses(filters.where, named=named)
        # On lines of its own, since it may end with a comment.
        conditions[named] = f"(\n{filters.where}\n)"
    return conditions


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _check_parentheses(where: str, *, named: str) -> None:
    """Whether none is closed that is not open: Lance reads up to there, and takes no notice of the rest."""
    depth = 0
    for letter in _UNREAD.sub("", where):
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            raise ConfigError(f"{named} is not understood: a parenthesis is closed that was never opened")


def _check_condition(images: Any, condition: str, *, named: str) -> None:
    """Whether a condition is understood by itself, to know which of several is not: read for no row."""
    with _misunderstandings(images, named):
        images.scanner(columns=["uri"], filter=condition, limit=0).to_table()


def _row_ids(images: Any, condition: str, *, named: str) -> NDArray[np.int64]:
    # A value that cannot be cast, or a zero that is divided by, shows in its row only.
    with lance_refusals(images.uri, remedy=REMEDY), _misunderstandings(images, named):
        rows = images.to_table(columns=[], filter=condition, with_row_id=True)
    return np.sort(rows["_rowid"].to_numpy().astype(np.int64))


@contextmanager
def _misunderstandings(images: Any, named: str) -> Iterator[None]:
    """Tell what Lance says of a condition, as it refuses one, in one line."""
    try:
        yield
    except ValueError as error:
        reason = shortened(_reason(str(error)), MAX_REASON_LETTERS)
        columns = ", ".join(columns_of(images))
        raise ConfigError(f"{named} is not understood: {reason}; columns: {columns}") from error


def _reason(said: str) -> str:
    """What Lance says, in one line and without what people have no use for."""
    reason = " ".join(said.split(", /")[0].split())
    if number := _NO_WHOLE_NUMBER.search(reason):
        found = f"{number[1]} is compared with a column of whole numbers ({number[2]}) that cannot hold it"
        return f"{found}: write whole numbers, without exponent or point"
    return reason.split(" Valid fields are")[0].removeprefix("Invalid user input: ").rstrip(".")
