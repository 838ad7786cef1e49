"""What is asked of an index, and what comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from for_ray.sheet import Box

MAX_HITS = 10_000
"""Images that one question ranks at most, all of its pages together: all that is known of the candidates is
held in memory."""

FOLD_AT = 0.935
"""Similarity from which images fold. Picture book, 60 of 2,500 val images: 95 of 100 copies at JPEG quality
40 or with a fifth more brightness are above this, and none of the images that are the nearest others."""


def shortened(text: str, num_letters: int = 100) -> str:
    """A text as a part of one line: without line breaks, and cut where it is longer."""
    line = " ".join(text.split())
    return line if len(line) <= num_letters else f"{line[:num_letters]}…"


@dataclass(frozen=True)
class Filters:
    """Which images may be found; all that are given must hold.

    Attributes:
        under: Uris that begin so: a folder, a bucket's prefix.
        glob: Uris that match: `*` any letters, slashes too, `?` one, `[a-c]` one of these.
        where: Lance's SQL over the table's columns, those of the manifest among them: `camera = 2`.
        image_ids: These alone, in any order; kept as a tuple.
    """

    under: str | None = None
    glob: str | None = None
    where: str | None = None
    image_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.image_ids is not None and not isinstance(self.image_ids, tuple):
            # Filters are keys: of the ids that are kept of them, and of an answer's pages.
            object.__setattr__(self, "image_ids", tuple(map(int, self.image_ids)))

    def __bool__(self) -> bool:
        return any(each is not None for each in (self.under, self.glob, self.where, self.image_ids))

    def __str__(self) -> str:
        named = self._named().items()
        parts = [f"{name} {shortened(value)}" for name, value in named if value is not None]
        return ", ".join(parts)

    def _named(self) -> dict[str, str | None]:
        ids = None if self.image_ids is None else f"of {len(self.image_ids):,} ids"
        return {"under": self.under, "that match": self.glob, "where": self.where, "one": ids}


@dataclass(frozen=True)
class Question:
    """One thing to look for, in one of three ways, and how it is to be answered.

    Attributes:
        text: Words, in the grammar of `retrieval.grammar`.
        image: An image file (JPEG, PNG, …), encoded as the index's images are.
        region: With an image, or with an image of the index, the object that this box of it shows: x0, y0,
            x1, y1 as fractions of the upright image.
        like: An image of the index, `IMAGE_ID`, or an object of it, `IMAGE_ID:SLOT`.
        k: Images an answer, 1 to `MAX_HITS`.
        filters: Which images may be found.
        min_score: Images below it are not hits.
        fold_at: Images as similar as this to a better one are listed under it; None folds none.
        unwanted_above: Cosine from which an image shows what a NOT rules out; None takes it from the index.
        page: The token of the answer before; None asks for the first page.
    """

    text: str | None = None
    image: bytes | None = None
    region: Box | None = None
    like: str | None = None
    k: int = 50
    filters: Filters = field(default_factory=Filters)
    min_score: float | None = None
    fold_at: float | None = None
    unwanted_above: float | None = None
    page: str | None = None

    @property
    def key(self) -> str:
        """The same for the pages of one question."""
        image = None if self.image is None else hashlib.sha256(self.image).hexdigest()
        asked = repr(replace(self, image=None, page=None, k=1)) + repr(image)
        return hashlib.sha256(asked.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Found:
    """What stands for one name of a question in an image.

    Attributes:
        name: As it was asked for; empty where a picture was.
        score: The cosine.
        slot: The stored vector that it comes from.
        box: What that vector speaks for: x0, y0, x1, y1 as fractions of the upright image's width and height.
    """

    name: str
    score: float
    slot: int
    box: Box

    def to_json(self) -> dict[str, Any]:
        """As in an answer's JSON."""
        box = [round(side, 4) for side in self.box]
        return {"name": self.name, "score": self.score, "slot": self.slot, "box": box}


@dataclass(frozen=True)
class Hit:
    """One image of an answer.

    Attributes:
        uri: Where the image lies.
        score: Largest cosine between the query and the image's stored vectors; of several names, that of the
            weakest; of a picture, the mean over its own vectors.
        image_id: Its row id in `images.lance`.
        slot: The stored vector of the first of `found`.
        box: Likewise.
        etag: The state of the image that was encoded, for `storage.read_image`; may be empty.
        found: One for each name that the image answers, in the question's order.
        folded: Uris of images that are nearly the same, and not in the answer.
        width: Of the upright image in pixels; None where it is not known.
        height: Likewise.
    """

    uri: str
    score: float
    image_id: int
    slot: int
    box: Box
    etag: str
    found: tuple[Found, ...] = ()
    folded: tuple[str, ...] = ()
    width: int | None = None
    height: int | None = None

    def to_json(self) -> dict[str, Any]:
        """What `jobs/search.py --json` prints of a hit."""
        return {
            "uri": self.uri,
            "score": self.score,
            "image_id": self.image_id,
            "slot": self.slot,
            "box": [round(side, 4) for side in self.box],
            "found": [each.to_json() for each in self.found],
            "folded": list(self.folded),
        }


@dataclass(frozen=True)
class Answer:
    """What one snapshot answers to a question.

    Attributes:
        hits: Best first, ties by image id; k of them, unless `reason` says why there are fewer.
        names: Those of the question, the unwanted left out; empty where a picture was asked with.
        snapshot_id: Which state of the index was asked.
        num_looked_at: Images that were scored with their stored vectors.
        is_complete: Whether there are k hits.
        is_exhaustive: Whether every vector that may be found was looked at, if only by its code. An answer
            with fewer than k hits and no `min_score`, `fold_at` or `page` always has looked at all, unless
            who asked set a bound, and `reason` says that it was reached.
        is_proven: Whether, by the codes' scores, no other image in the lists that were looked at is better;
            in all lists where it `is_exhaustive`.
        reason: Why there are fewer than k hits, one line; None where there are k.
        next_page: For the next question's `page`; None where nothing is left.
        seconds: What took how long: `encode`, `filter`, `faiss` (the segments), `rank` (with stored vectors,
            and their reading), `search` (both of these), `total`.
    """

    hits: tuple[Hit, ...]
    names: tuple[str, ...]
    snapshot_id: int
    num_looked_at: int
    is_complete: bool
    is_exhaustive: bool
    is_proven: bool
    reason: str | None = None
    next_page: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "hits": [hit.to_json() for hit in self.hits],
            "names": list(self.names),
            "snapshot_id": self.snapshot_id,
            "num_looked_at": self.num_looked_at,
            "is_complete": self.is_complete,
            "is_exhaustive": self.is_exhaustive,
            "is_proven": self.is_proven,
            "reason": self.reason,
            "next_page": self.next_page,
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
        }


@dataclass(frozen=True)
class Query:
    """A question as vectors.

    Attributes:
        terms: Unit vectors [t, D]; of a picture, its own.
        names: Of the terms; none where the terms are a picture's.
        clauses: Wanted and unwanted terms; none where an image counts with the mean over all terms.
    """

    terms: NDArray[np.float32]
    names: tuple[str, ...] = ()
    clauses: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def is_one_vector(self) -> bool:
        """Whether the nearest vector alone decides."""
        return len(self.terms) == 1 and self.clauses in ((), (((0,), ()),))

    @property
    def wanted_names(self) -> tuple[str, ...]:
        """The names that some clause wants."""
        wanted = {term for clause, _ in self.clauses for term in clause}
        return tuple(name for term, name in enumerate(self.names) if term in wanted)

    @property
    def fewest_objects(self) -> int:
        """Vectors that an image must have to answer."""
        return min((len(wanted) for wanted, _ in self.clauses), default=1)
