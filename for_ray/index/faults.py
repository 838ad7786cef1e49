"""What may be wrong with the rows and vectors of an index, counted by kind, and what to do about it."""

from __future__ import annotations

from typing import NamedTuple

MEND_SEGMENTS = (
    "go back to a sound snapshot (--rollback), or give jobs/index.py another --codec: it builds all segments "
    "anew from the stored vectors"
)
MEND_ROWS = "delete these rows of the table and run jobs/index.py again: it encodes their images anew"

_RUN_AGAIN = "run jobs/index.py again: it deletes the older rows"

_KINDS = {
    "both": ("images with an error and vectors, neither indexed nor quarantined, in {table}", MEND_ROWS),
    "neither": ("images with neither an error nor a vector in {table}", MEND_ROWS),
    "boxes": ("images with another number of boxes than of vectors in {table}", MEND_ROWS),
    "values": ("vectors that are not finite or not of length 1 in {table}", MEND_ROWS),
    "twice": ("uris that are more than once in {table}", _RUN_AGAIN),
    "twice_later": (
        "images that are more than once, as they are, in the table's latest version, after {table}",
        _RUN_AGAIN,
    ),
    "dropped": (
        "images of {table} that its latest version lacks",
        "rows were deleted by hand, or a run is under way or has died: run jobs/index.py again",
    ),
    "undead": (
        "images that the snapshot calls deleted, so that searches pass them over, in {table}",
        MEND_SEGMENTS,
    ),
    "unindexed": ("vectors that are in no segment, in {table}", MEND_SEGMENTS),
    "doubled": ("vectors that are in two segments, or in one of them twice", MEND_SEGMENTS),
    "orphaned": (
        "vectors in segments of images that the snapshot does not call deleted and that are not in {table}",
        MEND_SEGMENTS,
    ),
    "slots": ("vectors in segments of slots that their images do not have in {table}", MEND_SEGMENTS),
}
"""What is counted: what it is, and what to do."""


class Fault(NamedTuple):
    """How often something is wrong, and where for example."""

    num: int
    example: str


class Faults:
    """What is wrong with rows and vectors, by kind; those of many tasks add up."""

    def __init__(self) -> None:
        self._found: dict[str, Fault] = {}

    def add(self, kind: str, num: int, example: str) -> None:
        """Count some more of a kind of `_KINDS`; the first example stays."""
        known = self._found.get(kind, Fault(0, example))
        self._found[kind] = Fault(known.num + num, known.example)

    def merge(self, other: Faults) -> None:
        """Add what another task found."""
        for kind, fault in other._found.items():
            self.add(kind, *fault)

    def lines(self, table: str) -> list[str]:
        """A line for each kind.

        Args:
            table: What to call the table of images.
        """
        return [
            f"{what.format(table=table)}: {self._found[kind].num:,} ({self._found[kind].example}); {remedy}"
            for kind, (what, remedy) in _KINDS.items()
            if kind in self._found
        ]
