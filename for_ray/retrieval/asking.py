"""From vectors to an answer: rank, fold, cut the page, and say why there are no more hits."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from for_ray.errors import ConfigError
from for_ray.index.conjunction import ImageObjects, assign_slots, search_clauses
from for_ray.index.folding import fold_images
from for_ray.index.probe import Hits, Searchable
from for_ray.index.search import RankedImages, search_images
from for_ray.index.similar import search_similar
from for_ray.retrieval.paging import PageEnd, Reached, depths
from for_ray.retrieval.question import MAX_HITS, Answer, Found, Hit, Query, Question
from for_ray.retrieval.rows import SHOWN, objects_of, take_objects, take_rows, take_vectors
from for_ray.schema import Snapshot, unpack_boxes
from for_ray.sheet import Box

DEEP = 1024
"""Images of a ranking that is deep enough for a lowest score if its last is below that, whatever the code
says of those behind it."""

MAX_FOLDED = 1000
"""Hits of a folded question, its pages together; no deeper ranking is tried: each of its images is compared
with all that are kept before it."""


class Ranking(NamedTuple):
    """Images as a search ranked them, best first.

    `clauses` says which clause each answers, `ceiling` what others score at most, as far as the code knows.
    """

    image_ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    clauses: NDArray[np.int64]
    is_full: bool
    is_exhaustive: bool
    is_proven: bool
    num_candidates: int
    ceiling: float = -np.inf


class TimedSegments:
    """The vectors of a snapshot for one question, in one thread; `seconds` is what their search has taken."""

    def __init__(self, segments: Searchable) -> None:
        self._segments = segments
        self.dim, self.nlist = segments.dim, segments.nlist
        self.nprobe, self.num_vectors = segments.nprobe, segments.num_vectors
        self.seconds = 0.0

    def close(self) -> None:
        """The vectors stay open: other questions have them too."""

    def search(self, queries: NDArray[np.floating], k: int, **options: Any) -> Hits:
        """As `Searchable.search`."""
        started = time.perf_counter()
        try:
            return self._segments.search(queries, k, **options)
        finally:
            self.seconds += time.perf_counter() - started


@dataclass(frozen=True)
class Search:
    """One question over one snapshot.

    Attributes:
        snapshot: What is asked.
        images: Its table.
        segments: Its vectors.
        num_slots: Vectors that its encoder gives an image, at most.
        question: How to answer.
        query: What to look for.
        only: Images that may be found, ascending; None for all.
        end: Of the page before; None for the first page.
        limits: Gives the score from which an image shows an unwanted term, for each term.
        max_looked_at: Images that are scored at most where few answer; None for all.
    """

    snapshot: Snapshot
    images: Any
    segments: Searchable
    num_slots: int
    question: Question
    query: Query
    only: NDArray[np.int64] | None
    end: PageEnd | None
    limits: Callable[[NDArray[np.float32]], NDArray[np.float64]]
    max_looked_at: int | None = None

    def answer(self) -> Answer:
        """Rank as deep as the page needs."""
        question, num_before = self.question, self.end.num_shown if self.end else 0
        deepest = self._deepest
        if num_before + question.k > deepest:
            what = "all that one question ranks" if question.fold_at is None else "all that are folded"
            found = f"the answer would reach beyond {deepest:,} images, {what}"
            raise ConfigError(f"{found}: ask for fewer images, or filter")
        if self.num_slots < self.query.fewest_objects:
            return self._answer(_nothing(), np.empty(0, np.int64), np.empty(0, np.int64), 0)
        for depth in depths(num_before + question.k, begun=self.end.depth if self.end else 0):
            ranking = self._rank(depth)
            leaders = self._fold(ranking)
            shown = self._shown(ranking, leaders, depth)
            if len(shown) > question.k or not ranking.is_full or depth >= deepest or self._is_below(ranking):
                break
        return self._answer(ranking, leaders, shown, depth)

    @property
    def _deepest(self) -> int:
        """Hits that the question has at most, its pages together."""
        return MAX_HITS if self.question.fold_at is None else MAX_FOLDED

    def _is_below(self, ranking: Ranking) -> bool:
        """Whether the ranking goes on where no score is high enough, nor one that the code has wrong."""
        lowest = self.question.min_score
        if lowest is None or float(ranking.scores[-1]) >= lowest:
            return False
        return ranking.ceiling < lowest or len(ranking.scores) >= DEEP

    def _rank(self, depth: int) -> Ranking:
        segments, query, only = self.segments, self.query, self.only
        excluded = self.snapshot.deleted_image_ids
        if query.is_one_vector:
            found = search_images(
                segments,
                query.terms[0],
                depth,
                exact=self._vectors,
                exclude_image_ids=excluded,
                only_image_ids=only,
            )
            return _ranking(found, is_proven=True)
        if not query.clauses:
            found = search_similar(
                segments,
                query.terms,
                depth,
                exact=self._vectors,
                exclude_image_ids=excluded,
                only_image_ids=only,
            )
            return _ranking(found, is_proven=found.is_exhaustive)
        matches = search_clauses(
            segments,
            query.terms,
            query.clauses,
            depth,
            objects=self._objects,
            limits=self._limits_of_unwanted(),
            exclude_image_ids=excluded,
            only_image_ids=only,
            max_looked_at=sys.maxsize if self.max_looked_at is None else self.max_looked_at,
        )
        return Ranking(*matches)

    def _limits_of_unwanted(self) -> NDArray[np.float64]:
        terms = self.query.terms
        if not any(unwanted for _, unwanted in self.query.clauses):
            return np.full(len(terms), np.inf)
        if self.question.unwanted_above is not None:
            return np.full(len(terms), self.question.unwanted_above)
        return self.limits(terms)

    def _vectors(self, image_ids: NDArray[np.int64]) -> Any:
        return take_vectors(self.images, image_ids)

    def _objects(self, image_ids: NDArray[np.int64]) -> ImageObjects:
        return take_objects(self.images, image_ids)

    def _fold(self, ranking: Ranking) -> NDArray[np.int64]:
        """For each ranked image the place of the one that it is folded under; its own where it is kept."""
        ids = ranking.image_ids
        if self.question.fold_at is None or not len(ids):
            return np.arange(len(ids))
        return fold_images(self._vectors(ids), ids, threshold=self.question.fold_at)

    def _shown(self, ranking: Ranking, leaders: NDArray[np.int64], depth: int) -> NDArray[np.int64]:
        """The places of hits that no page before had."""
        is_shown = leaders == np.arange(len(leaders))
        if self.question.min_score is not None:
            is_shown &= ranking.scores >= self.question.min_score
        if self.end is not None:
            for each in self.end.reached:
                before = ranking if each.depth == depth else self._rank(each.depth)
                passed = each.passed(before.scores, before.image_ids)
                is_shown &= ~np.isin(ranking.image_ids, passed)
        return np.flatnonzero(is_shown)

    def _answer(
        self, ranking: Ranking, leaders: NDArray[np.int64], shown: NDArray[np.int64], depth: int
    ) -> Answer:
        k = self.question.k
        hits = self._hits(ranking, leaders, shown[:k])
        is_complete = len(hits) == k
        return Answer(
            hits,
            self.query.wanted_names,
            self.snapshot.snapshot_id,
            ranking.num_candidates,
            is_complete,
            ranking.is_exhaustive,
            ranking.is_proven,
            None if is_complete else self._reason(ranking, len(hits)),
            self._next_page(hits, depth) if len(shown) > k else None,
        )

    def _hits(
        self, ranking: Ranking, leaders: NDArray[np.int64], places: NDArray[np.int64]
    ) -> tuple[Hit, ...]:
        if not len(places):
            return ()
        folded = {place: np.flatnonzero(leaders == place)[1:] for place in places.tolist()}
        wanted = np.concatenate([places, *folded.values()])
        rows = take_rows(self.images, ranking.image_ids[wanted], [*SHOWN, "vectors", "boxes"])
        objects = objects_of(rows)
        row_of = {image_id: row for row, image_id in enumerate(objects.image_ids.tolist())}
        uris, etags, widths, heights = (rows[name].to_pylist() for name in SHOWN)
        hits = []
        for place in places.tolist():
            image_id = int(ranking.image_ids[place])
            row = row_of[image_id]
            found = self._found(objects, row, int(ranking.clauses[place]))
            first, copies = found[0], [row_of[int(ranking.image_ids[copy])] for copy in folded[place]]
            same = tuple(uris[copy] for copy in copies)
            score = float(ranking.scores[place])
            etag = etags[row] or ""
            where = (image_id, first.slot, first.box, etag)
            hits.append(Hit(uris[row], score, *where, found, same, widths[row], heights[row]))
        return tuple(hits)

    def _found(self, objects: ImageObjects, row: int, clause: int) -> tuple[Found, ...]:
        start, end = objects.offsets[row : row + 2]
        boxes, vectors = objects.boxes[start:end], objects.vectors[start:end].astype(np.float64)
        cosines = (vectors @ self.query.terms.astype(np.float64).T).astype(np.float32)  # [n, t]
        if not self.query.clauses:
            nearest = cosines.max(axis=1)
            slot = int(nearest.argmax())
            return (Found("", float(nearest[slot]), slot, _box(boxes[slot])),)
        wanted = list(self.query.clauses[clause][0])
        slots = assign_slots(cosines[:, wanted], boxes).tolist()
        return tuple(
            Found(self.query.names[term], float(cosines[slot, term]), slot, _box(boxes[slot]))
            for term, slot in zip(wanted, slots, strict=True)
        )

    def _next_page(self, hits: tuple[Hit, ...], depth: int) -> str | None:
        num_shown = len(hits) + (self.end.num_shown if self.end else 0)
        if num_shown >= self._deepest:
            return None
        shallower = [each for each in (self.end.reached if self.end else ()) if each.depth < depth]
        reached = (*shallower, Reached(depth, hits[-1].score, hits[-1].image_id))
        return PageEnd(self.snapshot.snapshot_id, self.question.key, num_shown, reached).token()

    def _reason(self, ranking: Ranking, num_hits: int) -> str:
        """Why there are no more hits."""
        snapshot, filters = f"snapshot {self.snapshot.snapshot_id}", self.question.filters
        needed = self.query.fewest_objects
        counted = "1 image" if num_hits == 1 else f"{num_hits:,} images" if num_hits else "no images"
        if not self.snapshot.indexed:
            return f"{snapshot} of the index holds no images"
        if self.only is not None and not len(self.only):
            return f"no image of {snapshot} passes the filter: {filters}"
        if self.num_slots < needed:
            return f"{needed} objects are asked for, and the index has {self.num_slots} vectors an image"
        if not (ranking.is_full or ranking.is_exhaustive):
            ended = f"the search ended after {ranking.num_candidates:,} images, and others may answer"
            return f"{counted}: {ended}; filter, or ask for what is less rare"
        lowest = self.question.min_score
        if lowest is not None and (ranking.scores < lowest).any():
            others = "no others score" if num_hits else "none score"
            return f"{counted}: {others} {lowest:g} or more; {_nearest(ranking, lowest)}"
        if ranking.is_full:
            return f"{counted}: the first {len(ranking.image_ids):,} fold into no more"
        reason = f"{counted}: this snapshot of the index holds no more"
        reason += f" that pass the filter: {filters}" if filters else ""
        if any(unwanted for _, unwanted in self.query.clauses):
            reason += "; the others show what NOT rules out, or too few objects"
        elif needed > 1:
            reason += " with so many objects"
        return reason


def _ranking(found: RankedImages, *, is_proven: bool) -> Ranking:
    clauses = np.zeros(len(found.image_ids), np.int64)
    flags = (found.is_complete, found.is_exhaustive, is_proven, found.num_candidates, found.ceiling)
    return Ranking(found.image_ids, found.scores, clauses, *flags)


def _nothing() -> Ranking:
    none = np.empty(0, np.int64)
    return Ranking(none, np.empty(0, np.float32), none, False, True, True, 0)


def _nearest(ranking: Ranking, lowest: float) -> str:
    return f"the best of them has {float(ranking.scores[ranking.scores < lowest].max()):.4f}"


def _box(box: NDArray[np.uint8]) -> Box:
    x0, y0, x1, y1 = unpack_boxes(box).tolist()
    return x0, y0, x1, y1
