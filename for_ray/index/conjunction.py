"""Search for several things at once: the images that show all of them, each in a place of its own.

Score of an image for a clause = the weakest of its wanted terms, when each is given a box of its own and the
weakest is as strong as can be; an image with an unwanted term, or with fewer boxes than terms, does not
count. Score for several clauses = that of the best. Terms are widened together in rounds, and every image
that comes up is scored with its stored vectors, once.

Source of the end of the rounds: Fagin's threshold algorithm. An image in no list of hits scores at most the
weakest of the lists' last scores; when the k-th image is above that, the rest is worse. The codes' scores are
approximations, so as many candidates as in `search` are looked at in any case.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from for_ray.index.probe import Searchable
from for_ray.index.search import CODE_NOISE, FEW_IMAGES, HITS_PER_IMAGE, RERANK_AT_ONCE, num_candidates
from for_ray.index.selection import allowed_ids, is_among
from for_ray.schema import image_ids_of

MAX_LOOKED_AT = 5000
"""Images scored for the proof that the rest is worse; for k images as many are scored as it takes."""

Clause = tuple[Sequence[int], Sequence[int]]
"""What is wanted (one or more; twice the same asks for two) and what is not; rows of the terms."""


class ImageObjects(NamedTuple):
    """The stored vectors of images with their boxes.

    Attributes:
        image_ids: int64 [b].
        offsets: int64 [b + 1]; image i has the vectors `offsets[i]` to `offsets[i + 1]`, in slot order.
        vectors: [n, D], unit length.
        boxes: uint8 [n, 4], as stored.
    """

    image_ids: NDArray[np.int64]
    offsets: NDArray[np.integer]
    vectors: NDArray[np.floating]
    boxes: NDArray[np.uint8]


Objects = Callable[[NDArray[np.int64]], ImageObjects]
"""The stored vectors and boxes of these images; ids that are not there may be left out."""


class Matches(NamedTuple):
    """The best images of a question, best first; ties by image id.

    Attributes:
        image_ids: int64 [R], distinct, R <= k.
        scores: float32 [R], exact.
        clauses: int64 [R], which clause gives the score; of equal ones the first.
        is_complete: Whether there are k.
        is_exhaustive: Whether every image that may be found was looked at.
        is_proven: Whether, by the codes' scores, no image that was not looked at is better; of lists that
            were not looked at, nothing is known.
        num_candidates: Images that were scored.
    """

    image_ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    clauses: NDArray[np.int64]
    is_complete: bool
    is_exhaustive: bool
    is_proven: bool
    num_candidates: int


def search_clauses(
    segments: Searchable,
    terms: NDArray[np.floating],
    clauses: Sequence[Clause],
    k: int,
    *,
    objects: Objects,
    limits: NDArray[np.floating],
    exclude_image_ids: NDArray[np.int64] | None = None,
    only_image_ids: NDArray[np.int64] | None = None,
    max_looked_at: int = sys.maxsize,
) -> Matches:
    """The k best images: k distinct ones, or all that answer the question, unless `max_looked_at` ends it.

    Args:
        segments: What is searched.
        terms: [t, D], unit length.
        clauses: One or more.
        k: At least 1; may exceed the number of images.
        objects: Gives the stored vectors for the exact scores.
        limits: [t]; an image whose score for an unwanted term is above its limit shows it.
        exclude_image_ids: Sorted; images that are never found.
        only_image_ids: Sorted and distinct; no other images are found; few of them are all scored, without
            the index.
        max_looked_at: Images scored at most, the best hits first, but as many as k images need in any case;
            where it ends the search, others may answer too.

    Raises:
        ValueError: k is below 1, there is no clause, one wants nothing, or shapes are wrong.
    """
    terms = np.asarray(terms, np.float32)
    _check(terms, clauses, k, limits)
    judge = _Judge(terms, clauses, limits, objects, k, max_looked_at)
    allowed = None if only_image_ids is None else allowed_ids(only_image_ids, exclude_image_ids)
    if allowed is not None and len(allowed) <= max(FEW_IMAGES, judge.least):
        judge.score(allowed)
        return judge.matches(is_exhaustive=True, is_proven=True)
    fetch, nprobe = HITS_PER_IMAGE * judge.least, segments.nprobe
    filters = {"exclude_image_ids": exclude_image_ids, "only_image_ids": only_image_ids}
    while True:
        hits = segments.search(terms[judge.wanted], fetch, nprobe=nprobe, **filters)
        is_drained = hits.scores.shape[1] < fetch  # nothing is left in these lists
        has_all = judge.score(_by_rank(hits.vector_ids))
        if has_all and is_drained and nprobe >= segments.nlist:
            return judge.matches(is_exhaustive=True, is_proven=True)
        is_proven = has_all and judge.is_proven(None if is_drained else hits.scores[:, -1])
        if is_proven or judge.has_enough:
            return judge.matches(is_exhaustive=False, is_proven=is_proven)
        fetch, nprobe = (fetch, 2 * nprobe) if is_drained else (2 * fetch, nprobe)


def assign_slots(cosines: NDArray[np.floating], boxes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Which slot answers for which term in one image: the weakest is as strong as can be, then the sum.

    Args:
        cosines: Of the image's vectors with the wanted terms [n, p]; p distinct boxes or more.
        boxes: [n, 4], as stored.

    Returns:
        A slot for each term [p]; no two slots, nor two with equal boxes.
    """
    found = ImageObjects(np.zeros(1, np.int64), np.array([0, len(boxes)]), np.empty((0, 0)), boxes)
    places, place_of = _by_place(found, np.asarray(cosines, np.float32))
    scores = places[0]  # [N, p]
    weakest = bottleneck(places)[0]
    chosen, terms = linear_sum_assignment(np.where(scores >= weakest, scores, -1e3), maximize=True)
    slots = np.empty(scores.shape[1], np.int64)
    for place, term in zip(chosen, terms, strict=True):
        slots[term] = np.argmax(np.where(place_of == place, cosines[:, term], -np.inf))
    return slots


def bottleneck(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """The weakest term's score when each term has a place of its own and the weakest is strongest.

    By Hall's theorem the terms can all have places of at least t if and only if any s of them together have s
    such places. So the answer is the smallest, over the sets of terms, of the s-th largest score that the
    places have for the best of the s terms.

    Args:
        scores: Of b images' places with p terms [b, N, p]; -inf where an image has fewer places.

    Returns:
        [b]; -inf where an image has fewer places than there are terms.
    """
    num_places, num_terms = scores.shape[1:]
    weakest = np.full(len(scores), np.inf if num_places >= num_terms else -np.inf, np.float32)
    for size in range(1, min(num_terms, num_places) + 1):
        for chosen in itertools.combinations(range(num_terms), size):
            nearest = scores[:, :, chosen].max(axis=2)  # [b, N, s] -> [b, N]
            weakest = np.minimum(weakest, np.partition(nearest, -size, axis=1)[:, -size])
    return weakest


class _Judge:
    """Scores images, each once, and keeps the k best."""

    def __init__(
        self,
        terms: NDArray[np.float32],
        clauses: Sequence[Clause],
        limits: NDArray[np.floating],
        objects: Objects,
        k: int,
        max_looked_at: int,
    ) -> None:
        self._terms, self._clauses, self._limits = terms.astype(np.float64).T, clauses, limits
        self._objects, self._k = objects, k
        self.least = num_candidates(k)  # images that are scored in any case
        self._most = max(self.least, FEW_IMAGES, max_looked_at)
        self.wanted = sorted({term for wanted, _ in clauses for term in wanted})
        self._seen = np.empty(0, np.int64)
        self._ids, self._of = np.empty(0, np.int64), np.empty(0, np.int64)
        self._scores = np.empty(0, np.float32)

    @property
    def num_scored(self) -> int:
        return len(self._seen)

    @property
    def is_full(self) -> bool:
        return len(self._ids) == self._k

    @property
    def floor(self) -> float:
        """The k-th score; -inf before there are k."""
        return float(self._scores[-1]) if self.is_full else -np.inf

    @property
    def has_enough(self) -> bool:
        """Whether the search ends without a proof."""
        enough = max(self.least, MAX_LOOKED_AT) if self.is_full else self._most
        return self.num_scored >= min(enough, self._most)

    def is_proven(self, last: NDArray[np.float32] | None) -> bool:
        """Whether images in no list of hits are worse, by the lists' last scores; None: they hold all."""
        ceiling = -np.inf if last is None else self._ceiling(last) + CODE_NOISE
        return self.num_scored >= self.least and ceiling < self.floor

    def score(self, image_ids: NDArray[np.int64]) -> bool:
        """Score the images that are new, the first ones up to the bound; whether it did all."""
        unseen = image_ids[~is_among(image_ids, self._seen)]
        new = np.sort(unseen[: self._most - len(self._seen)])
        self._seen = np.union1d(self._seen, new)
        for start in range(0, len(new), RERANK_AT_ONCE):
            found = self._objects(new[start : start + RERANK_AT_ONCE])
            if len(found.image_ids):
                self._keep(found.image_ids, *self._score(found))
        return len(new) == len(unseen)

    def matches(self, *, is_exhaustive: bool, is_proven: bool) -> Matches:
        return Matches(
            self._ids, self._scores, self._of, self.is_full, is_exhaustive, is_proven, self.num_scored
        )

    def _ceiling(self, last: NDArray[np.float32]) -> float:
        """The highest score of an image in no list of hits."""
        by_term = dict(zip(self.wanted, last.tolist(), strict=True))
        return float(max(min(by_term[term] for term in wanted) for wanted, _ in self._clauses))

    def _score(self, found: ImageObjects) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        # In float64 and rounded once, as in `search`: equal images have equal scores.
        cosines = (found.vectors.astype(np.float64) @ self._terms).astype(np.float32)
        places, _ = _by_place(found, cosines)
        best = places.max(axis=1, initial=-np.inf)  # [b, N, t] -> [b, t]
        shows = best > self._limits
        scores = [
            np.where(shows[:, list(unwanted)].any(axis=1), -np.inf, bottleneck(places[:, :, list(wanted)]))
            for wanted, unwanted in self._clauses
        ]
        clause = np.argmax(scores, axis=0)
        return np.max(scores, axis=0).astype(np.float32), clause

    def _keep(
        self, image_ids: NDArray[np.int64], scores: NDArray[np.float32], clauses: NDArray[np.int64]
    ) -> None:
        answers = np.isfinite(scores)
        ids = np.concatenate([self._ids, np.asarray(image_ids, np.int64)[answers]])
        scores = np.concatenate([self._scores, scores[answers]])
        clauses = np.concatenate([self._of, clauses[answers]])
        best = np.lexsort((ids, -scores))[: self._k]
        self._ids, self._scores, self._of = ids[best], scores[best], clauses[best]


def _by_rank(vector_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The images of hits [Q, R], each once: the first hit of every query, then the second, and so on."""
    ranked = vector_ids.T[vector_ids.T >= 0]
    image_ids, firsts = np.unique(image_ids_of(ranked), return_index=True)
    return image_ids[np.argsort(firsts)]


def _by_place(
    found: ImageObjects, cosines: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores by image and box [b, N, t], -inf where an image has fewer than N boxes, and each vector's box.

    Slots with equal boxes speak for the same place: the best of them counts.
    """
    offsets = np.asarray(found.offsets, np.int64)
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    boxes = np.ascontiguousarray(found.boxes[offsets[0] : offsets[-1]]).view("<u4").reshape(-1)
    keys, place_of = np.unique((rows << 32) | boxes.astype(np.int64), return_inverse=True)
    rows = keys >> 32
    firsts = np.searchsorted(rows, np.arange(len(offsets) - 1))
    columns = np.arange(len(rows)) - firsts[rows]
    num_places = int(columns.max()) + 1 if len(columns) else 0
    best = np.full((len(keys), cosines.shape[1]), -np.inf, np.float32)
    np.maximum.at(best, place_of, cosines[offsets[0] : offsets[-1]])
    places = np.full((len(offsets) - 1, num_places, cosines.shape[1]), -np.inf, np.float32)
    places[rows, columns] = best
    return places, columns[place_of]


def _check(
    terms: NDArray[np.float32], clauses: Sequence[Clause], k: int, limits: NDArray[np.floating]
) -> None:
    if k < 1 or not clauses or not all(wanted for wanted, _ in clauses):
        raise ValueError(f"expected k >= 1 and clauses that want something, got k = {k} and {clauses}")
    if terms.ndim != 2 or limits.shape != (len(terms),):
        raise ValueError(f"expected terms [t, D] and limits [t], got {terms.shape} and {limits.shape}")
